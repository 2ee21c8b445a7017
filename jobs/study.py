r"""ray job submit --working-dir . --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}' \
  -- python jobs/study.py run projector -o s3://BUCKET/studies/projector

By default Ray kills a job 3 s after `ray job stop`.
"""

import sys

from ssl_ray.cli import run

run(["study", *sys.argv[1:]])
