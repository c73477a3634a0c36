"""`clinkd sweep` as a Ray job: ray job submit --working-dir . -- python ray_jobs/sweep.py ARGUMENTS"""

import sys

from clinkd.cli import main

sys.exit(main(["sweep", *sys.argv[1:]]))
