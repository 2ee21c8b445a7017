from ssl_ray.cli import run

run()
