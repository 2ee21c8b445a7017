"""ray job submit --working-dir . -- python jobs/study.py run projector -o s3://BUCKET/studies/projector"""

import sys

from ssl_ray.cli import run

run(["study", *sys.argv[1:]])
