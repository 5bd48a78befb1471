"""What goes wrong between here and the Hugging Face hub, in the user's words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_compress.cache.hub_address import HubAddress
from hf_compress.errors import CacheError, CompressionError

_LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"
# huggingface_hub's own errors are errors of the HTTP library that it uses, which its versions change; a broken connection is one, too.
_CONNECTION: tuple[type[Exception], ...] = (*(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)), OSError)
_FAILURES: tuple[type[Exception], ...] = (*_CONNECTION, RuntimeError, ValueError)


class HubUnreachableError(CacheError):
    """There is no way to the hub now: no network, HF_HUB_OFFLINE, or the hub itself is down."""


@contextmanager
def hub_errors(address: HubAddress, doing: str, then: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error of hf_compress.

    Args:
        address: what is spoken of.
        doing: what is done meanwhile, after "while", as in "it was looked up".
        then: what to do when a connection broke.

    Raises:
        HubUnreachableError: nothing can be said of the repository.
        CacheError: the hub refused, and why.
    """
    try:
        yield
    except CompressionError:
        raise
    except _FAILURES as error:
        raise _translated(address, _innermost(error), doing, then) from error


def _translated(address: HubAddress, error: BaseException, doing: str, then: str) -> CacheError:
    page = f"{constants.ENDPOINT}/datasets/{address.repo}"
    if isinstance(error, GatedRepoError):
        return CacheError(f"{address}: its owner gives access to those who ask for it. Ask on {page}, then {_LOG_IN}.")
    if isinstance(error, RepositoryNotFoundError):
        return CacheError(
            f"{address}: there is no data set {address.repo} on {constants.ENDPOINT}, or it is private and you may not see it. Look at the "
            f"spelling; for a private one {_LOG_IN}. Nothing is built on the hub: to make one, build the cache in a folder "
            f"(--teacher_cache_dir FOLDER and the teacher), then `hf-compress cache push FOLDER {address.repo}`."
        )
    if isinstance(error, RevisionNotFoundError):
        return CacheError(f"{address}: {address.repo} has no branch, tag or commit {address.revision}. {page}/commits shows what there is.")
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(f"{address} cannot be reached: HF_HUB_OFFLINE is set. Take it away, then {then}.")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return CacheError(f"{address}: {constants.ENDPOINT} does not take your token, or you have none. To get in, {_LOG_IN}.")
    if status == 403:
        return CacheError(
            f"{address}: your token may not do that. Is {address.repo.partition('/')[0]} you, or an organization that you belong to, and "
            f"may the token write? {constants.ENDPOINT}/settings/tokens shows what it may. {_first_line(error)}"
        )
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(f"The disk is full: no room for what comes from {address} in {constants.HF_HOME}. Make room there, then {then}.")
    if isinstance(error, OSError) and error.filename is not None:
        return CacheError(f"{error.filename}: {error.strerror}, while {doing}. Set HF_HOME to a folder that can be written, then {then}.")
    if not isinstance(error, _CONNECTION) or (status is not None and status < 500 and status not in (408, 429)):
        return CacheError(f"{address}: {constants.ENDPOINT} refused, while {doing}: {_first_line(error)}")
    return HubUnreachableError(f"{address}: no way to {constants.ENDPOINT}, or none back, while {doing}: {_first_line(error)}. So {then}.")


def _innermost(error: BaseException) -> BaseException:
    """What huggingface_hub met with, where it wraps that in an error of its own."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
