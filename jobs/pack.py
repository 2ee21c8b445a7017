"""ray job submit --working-dir . -- python jobs/pack.py /data/images s3://BUCKET/train"""

import sys

from ssl_ray.cli import run

run(["data", "pack", *sys.argv[1:]])
