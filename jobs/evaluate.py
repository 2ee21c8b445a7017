"""ray job submit --working-dir . -- python jobs/evaluate.py s3://BUCKET/runs/one --json"""

import sys

from ssl_ray.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
