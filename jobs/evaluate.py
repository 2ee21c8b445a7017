"""ray job submit --working-dir . -- python jobs/evaluate.py s3://BUCKET/runs/one --json"""

import sys

from ssl_ray.cli import run

run(["evaluate", *sys.argv[1:]])
