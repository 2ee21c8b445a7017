"""ray job submit --working-dir . -- python jobs/pack.py /data/images s3://BUCKET/train"""

import sys

from ssl_ray.cli import main

sys.exit(main(["data", "pack", *sys.argv[1:]]))
