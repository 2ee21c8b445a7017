r"""ray job submit --working-dir . --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' \
  -- python jobs/evaluate.py s3://BUCKET/runs/one --json

By default Ray kills a job 3 s after `ray job stop`.
"""

import sys

from ssl_ray.cli import run

run(["evaluate", *sys.argv[1:]])
