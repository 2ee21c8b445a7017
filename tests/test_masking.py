"""What is named as a secret, in whatever form a file or a log has it."""

import pytest

from ssl_ray.masking import without_any_secret, without_secrets

SECRETS = [
    "aws_secret_access_key = {}",
    "Authorization: Bearer {}",
    "'authorization': 'Basic {}'",
    "GET /api with bearer {} refused",
    '{{"user": "me", "password": "{}"}}',
    '{{"password": "with \\"a quote {}"}}',
    '{{"message": "asked with {{\\"password\\": \\"{}\\"}}"}}',
    "--password={} --user=me",
    "--api-key {} --user me",
    "PGPASS={}",
    "MYSQL_PWD='{} and more'",
    "secret_key={}",
    '"SecretAccessKey": "{}"',
    "x-amz-security-token:{}",
    "db_pass: {}",
    "password=b'{}'",
]
INNOCENT = [
    '{"loss": 12.3456789, "seed": 123456789, "path": "/home/ray/run", "key": "000000000012"}',
    "author: somebody-there, passes=123456789, compass: northwest",
    "KeyError: something else, InvalidTokenError: something else",
    "token_file=/home/ray/token RAY_AUTH_TOKEN_PATH=/home/ray/token auth: null",
    "keys: everything tokens_seen=123456789 PWD=/home/ray/folder",
]


@pytest.mark.parametrize("form", SECRETS)
@pytest.mark.parametrize("secret", ["s3cret/V4lue+x==", "hunter2/"])
def test_a_value_of_what_is_named_as_a_secret_is_masked_and_nothing_else(form: str, secret: str):
    cleaned = without_any_secret(form.format(secret), [])
    assert secret not in cleaned, cleaned
    assert "***" in cleaned
    assert "me" not in form.split() or "me" in cleaned


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_is_left(text: str):
    assert without_any_secret(text, []) == text


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "DBPASS", "SSHKEY", "WANDB_API_KEY", "HTTP_AUTH", "KEY1"])
def test_a_secret_of_the_environment_is_masked_before_one_that_it_begins_with(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv(name, "abcdefgh-and-the-rest")
    assert without_secrets("refused: abcdefgh-and-the-rest, abcdefgh") == "refused: ***, ***"


@pytest.mark.parametrize("name", ["GOOGLE_APPLICATION_CREDENTIALS", "RAY_AUTH_TOKEN_PATH", "OLDPWD"])
def test_the_place_of_a_file_is_shown(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "/etc/a-place-of-its-own")
    assert without_secrets("/etc/a-place-of-its-own: not found") == "/etc/a-place-of-its-own: not found"
