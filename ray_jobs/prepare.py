"""`clinkd prepare` as a Ray job: ray job submit --working-dir . -- python ray_jobs/prepare.py ARGUMENTS"""

import sys

from clinkd.cli import main

sys.exit(main(["prepare", *sys.argv[1:]]))
