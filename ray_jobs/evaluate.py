"""`clinkd evaluate` as a Ray job: ray job submit --working-dir . -- python ray_jobs/evaluate.py ARGUMENTS"""

import sys

from clinkd.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
