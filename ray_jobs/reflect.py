"""The stage reflect as a Ray job: ray job submit --working-dir . -- python ray_jobs/reflect.py
configs/tiny.yaml"""

import sys

from clinkd.cli import main

sys.exit(main(["train", "reflect", *sys.argv[1:]]))
