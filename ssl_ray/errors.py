"""The errors a user can meet. Each says in a line or two what and where, got and expected, and what to do.

SslRayError             exit code 1
  UsageError            2   a wrong key, type, value or combination of them
    RunMismatchError    2   the run URI holds a run of another configuration
  DataError             3   shards, manifest, samples or storage
  ResourceError         4   CPU, memory, disk, a lease
  TrainingError         1   NaN, inf or a collapsed embedding
  Stopped               130 stopped by a signal, with a checkpoint

The one argument of each is its message, so that they survive the pickling between Ray processes.
"""


class SslRayError(Exception):
    exit_code = 1


class UsageError(SslRayError):
    exit_code = 2


class RunMismatchError(UsageError):
    pass


class DataError(SslRayError):
    exit_code = 3


class ResourceError(SslRayError):
    exit_code = 4


class TrainingError(SslRayError):
    exit_code = 1


class Stopped(SslRayError):
    exit_code = 130
