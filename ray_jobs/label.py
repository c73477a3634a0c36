"""`clinkd label` as a Ray job: ray job submit --working-dir . -- python ray_jobs/label.py ARGUMENTS"""

import sys

from clinkd.cli import main

sys.exit(main(["label", *sys.argv[1:]]))
