r"""ray job submit --working-dir . --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' \
  -- python jobs/pretrain.py data.uri=s3://BUCKET/train run=s3://BUCKET/runs/one

By default Ray kills a job 3 s after `ray job stop`.
"""

import sys

from ssl_ray.cli import run

run(["pretrain", *sys.argv[1:]])
