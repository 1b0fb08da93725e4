"""The URI of an object store, taken apart: which store, and the key as it stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from depthvar.errors import InputError

_OPTIONS = (
    *("region", "scheme", "endpoint_override", "tls_ca_file_path", "tls_verify_certificates"),
    *("allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open", "smart_defaults"),
    *("retry_limit_seconds", "project_id", "blob_storage_authority", "dfs_storage_authority"),
    *("enable_tls", "credential_kind", "tenant_id", "client_id", "client_secret"),
    "background_writes",
)
"""What pyarrow takes after `?` in the URIs of S3, GCS and Azure."""


@dataclass(frozen=True)
class StoreUri:
    """A store's URI in its parts: `scheme://[user:password@]bucket/key[?options]`.

    The key is the text itself, save for a slash at its end: nothing is decoded, cut or joined.
    Options are what follows the last `?` where it reads `name=value[&name=value]`; any other `?`
    belongs to the key. A key that itself ends so is written with an option after it:
    `s3://bucket/a?b=c?region=us-east-1`.
    """

    scheme: str
    authority: str = field(repr=False)
    key: str
    options: str = field(repr=False)

    @staticmethod
    def parse(uri: str) -> StoreUri:
        """Take a URI apart without asking anybody.

        Errors: `InputError` where there is no bucket, and for keys that no client would keep as
        they are: empty, `.` and `..` parts.
        """
        scheme, _, rest = uri.partition("://")
        rest, options = _without_options(rest)
        authority, _, key = rest.partition("/")
        parts = StoreUri(scheme, authority, key.removesuffix("/"), options)
        bucket = authority.rpartition("@")[2]
        names = key.split("/")
        right = "/".join(name for name in names if name not in ("", ".", ".."))
        if not bucket:
            example = right or "bucket/folder"
            raise InputError(f"got {parts} without a bucket: write {scheme}://{example}")
        is_azure = scheme.startswith("abfs")  # whose host may have a port
        if not re.fullmatch(r"[A-Za-z0-9._:-]+" if is_azure else r"[A-Za-z0-9._-]+", bucket):
            raise InputError(
                f"got a URI of {scheme}:// with something else than a bucket: write {scheme}://"
                "bucket/folder, with %2F for / in a password, and ?endpoint_override=host:port"
            )
        if {".", ".."} & set(names) or "" in names[:-1]:
            raise InputError(
                f"got {parts}, whose key has an empty, . or .. part, which clients of stores "
                f"change: write {scheme}://{bucket}/{right}"
            )
        return parts

    @property
    def base(self) -> str:
        """The URI without its key: what says which store and how to speak with it."""
        return f"{self.scheme}://{self.authority}" + (f"?{self.options}" if self.options else "")

    def __str__(self) -> str:
        """Without user, password and options: these can hold credentials."""
        bucket = self.authority.rpartition("@")[2]
        return f"{self.scheme}://{bucket}/{self.key}".removesuffix("/")


def _without_options(rest: str) -> tuple[str, str]:
    """A URI's text after `://` as (bucket and key, options): see `StoreUri`."""
    before, mark, last = rest.rpartition("?")
    pairs = [pair.partition("=") for pair in last.split("&")]
    if not mark or not all(name and equals for name, equals, _ in pairs):
        return rest, ""
    unknown = sorted({name for name, _, _ in pairs} - set(_OPTIONS))
    if not unknown:
        return before, last
    if "/" in last:
        return rest, ""
    raise InputError(
        f"got a URI that ends in ?{unknown[0]}=..., wanted options such as region and "
        "endpoint_override: correct it, or, where it is a part of the key, write an option after "
        "it, such as ?region=us-east-1"
    )
