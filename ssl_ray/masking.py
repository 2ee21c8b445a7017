"""What must not be read by others, masked with ***, in messages, logs and what is passed on of them."""

import contextlib
import json
import os
import re
from pathlib import Path

USER_INFO = re.compile(r"(?<=://)([^/\s]*|[^/\s:]*:(?!\d+/)\S*)@")
"""Keys of S3 may hold a slash, unlike those of a correct URI; what has a port is no password."""
_PARAMETER = re.compile(
    r"(?<=[?&;])((?:x-(?:amz|goog)-)?(?:signature|credential|security-token)|awsaccesskeyid|sig|(?:access_?)?token|secret|password)"
    r"=[^&;\s'\"]*",
    re.IGNORECASE,
)
_ACCOUNT_KEY = re.compile(r"((?:AccountKey|SharedAccessSignature)=)[^;\s'\"]+", re.IGNORECASE)
"""Parts of Azure's connection strings."""
_VARIABLE = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|KEY|CREDENTIAL|CONNECTION_STRING|AUTHORIZATION|(?:AUTH|PASS|PWD)(?![A-Z])"
)
"""In the name of a variable."""
_FIELD = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|(?:CREDENTIALS?|CONNECTION_STRING|TOKEN|AUTHORIZATION|PGPASS)$|(?:^|_)(?:AUTH|PASS|PWD)$"
    r"|(?:API|ACCESS|PRIVATE|ACCOUNT|STORAGE|SHARED|SIGNING|ENCRYPTION|MASTER)_?KEY$"
)
"""In another name, as of a header, an option or a field of JSON, in capitals: a sample has a `key`, a run an `author`."""
_NO_SECRET = ("_PATH", "_FILE", "_MODE", "_URI", "_URL", "_SOCK", "_ERROR", "_EXCEPTION")
_PLACES = ("PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS")
"""Variables that hold a place, whatever their names say."""
_LEAST = 8
"""A shorter value, as `true`, is no secret, and may be part of any word."""
_NAMED = re.compile(r"(?<![A-Za-z0-9_])(?:--([A-Za-z][\w-]{0,80})[ \t]+|([A-Za-z][\w-]{0,80})(?:\\*['\"])?[ \t]*[=:][ \t]*)")
"""A name before its value in a text, as of a variable, an option or JSON: those of a cluster's machines are not known here."""
_VALUE = re.compile(
    r"(?P<before>[bru]?(?P<quote>\\*['\"]))(?:(?!(?P=quote))(?:\\.|.))+"
    r"|(?:(?:Bearer|Basic|Digest)[ \t]+)?[^\s'\",;{\[(][^\s'\",;]*",
    re.IGNORECASE,
)
_NO_VALUE = ("none", "null", "true", "false")
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` with *** for users and passwords in URIs, signatures and tokens in their queries, and secrets of the environment."""
    text = _PARAMETER.sub(r"\1=***", USER_INFO.sub("***@", text))
    text = _ACCOUNT_KEY.sub(r"\1***", text)
    found = [value for name, value in os.environ.items() if len(value) >= _LEAST and value in text and is_secret(name.upper())]
    for value in sorted(found, key=len, reverse=True):  # one may begin with another
        text = text.replace(value, "***")
    return text


def without_any_secret(text: str, known: list[str]) -> str:
    """`text` as others may have it, wherever it is from: without what `known` lists, and values with the name of a secret."""
    text = "\n".join(map(without_secrets, text.split("\n")))
    for secret in known:
        text = text.replace(secret, "***")
    return _BEARER.sub(r"\1***", _without_named(text))


def is_secret(name: str) -> bool:
    """Whether the value of a variable, which is in capitals, or of what else has a name, is one; that of one that names a file
    is not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").upper()
    if words in _PLACES or words.endswith(_NO_SECRET):
        return False
    return (_VARIABLE if name.isupper() else _FIELD).search(words) is not None


def secrets_here() -> list[str]:
    """Values of variables that are secrets, as JSON has them too, and Ray's tokens of this user; the longest first."""
    found = [value for name, value in os.environ.items() if is_secret(name.upper())]
    found += [value.split()[-1] for value in found if _BEARER.match(value)]
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), os.path.expanduser("~/.ray/auth_token")):
        with contextlib.suppress(OSError, ValueError):
            found += [Path(path).read_text().strip()] if path else []
    found += [json.dumps(value)[1:-1] for value in found]
    return sorted({value for value in found if len(value) >= _LEAST}, key=len, reverse=True)


def _without_named(text: str) -> str:
    """`text` with *** for values whose names are those of secrets, within other values too."""
    parts, end = [], 0
    for name in _NAMED.finditer(text):
        if name.start() < end or not is_secret(name[1] or name[2]):
            continue
        value = _VALUE.match(text, name.end())
        if value is not None and value[0].lower() not in _NO_VALUE:
            parts += [text[end : name.end()], value["before"] or "", "***"]
            end = value.end()
    return "".join([*parts, text[end:]])
