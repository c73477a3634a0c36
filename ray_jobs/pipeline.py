"""The whole pipeline as a Ray job: ray job submit --working-dir . -- python ray_jobs/pipeline.py
configs/tiny.yaml"""

import sys

from clinkd.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
