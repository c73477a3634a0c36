"""`clinkd train` as a Ray job: ray job submit --working-dir . -- python ray_jobs/train.py ARGUMENTS"""

import sys

from clinkd.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
