"""ray job submit --working-dir . -- python jobs/pretrain.py data.uri=s3://BUCKET/train run=s3://BUCKET/runs/one"""

import sys

from ssl_ray.cli import run

run(["pretrain", *sys.argv[1:]])
