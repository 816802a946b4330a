"""Files to and from the model hub of Hugging Face, and what went wrong there in one line.

Only whoever names a repository asks for a transfer. The token is that of `hf auth login` or of
HF_TOKEN, and is neither taken as an argument nor printed. HF_ENDPOINT names another server of the
same protocol. Free of torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lgm_scale.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(name: str | Path) -> bool:
    """Whether this names a repository: owner/name, with neither of them a folder here."""
    here = Path(name)
    looks = isinstance(name, str) and bool(_NAME.fullmatch(name))
    return looks and not here.exists() and not here.parent.exists()


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, as it was when the hub's library was imported."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def download(name: str, files: Sequence[str], revision: str | None) -> Path:
    """Files of a repository, in one folder of the hub's cache, named after the commit.

    What the cache has is not transferred again; what is shows a progress bar. Without a network, a
    revision that is in the cache is taken.

    Raises: CheckpointError.
    """
    from huggingface_hub import hf_hub_download

    print(
        f"{name}: no folder here; {', '.join(files)} of {endpoint()}/{name} at revision "
        f"{revision or 'main'} (downloaded, where the cache lacks them)",
        file=sys.stderr,
    )
    folder = Path()
    with _faults(name, revision):
        for file in files:
            path = hf_hub_download(name, file, revision=revision)
            folder = Path(path).parents[len(Path(file).parts) - 1]
            revision = folder.name  # the rest comes from the same commit
    return folder


def upload(name: str, files: Mapping[str, Path | str], message: str, private: bool) -> str:
    """Put files into a repository as one commit, and make it if there is none; return its address.

    `files` are paths in the repository -> files here, or text. Raises: CheckpointError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise CheckpointError(
            f"{name}: no token for {endpoint()}: make one that may write in your settings there, "
            "and give it to `hf auth login`, or as HF_TOKEN"
        )
    additions = [
        CommitOperationAdd(path, content.encode() if isinstance(content, str) else str(content))
        for path, content in files.items()
    ]
    with _faults(name, None):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, additions, commit_message=message)
    return f"{endpoint()}/{name}"


@contextmanager
def _faults(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into one line and what to do."""
    import requests
    from huggingface_hub import errors

    hub, login = endpoint(), "`hf auth login` or HF_TOKEN"
    try:
        yield
    except (requests.ConnectionError, requests.Timeout, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(_unreachable(name, error)) from error
    except errors.LocalEntryNotFoundError as error:  # before the next: it is one of them
        raise CheckpointError(_unreachable(name, error.__cause__ or error)) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is no bundle of this project, or not all of it is there: {hub}/{name} lacks "
            "a file; name another repository, or publish the bundle again"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"revision: {hub}/{name} has no {revision!r}; name a branch, a tag or a commit of it"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: accept its conditions at {hub}/{name} first, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: neither a folder here, nor a repository of {hub} that you may see; check the "
            f"name, and for a private one {login}"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name}: no name of a repository; write owner/name of letters, digits, - _ and ."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "nothing"
        hint = {
            401: f"the token is not valid; {login} with another",
            403: f"the token may not do this; {login} with one that may write to {name}",
        }.get(status, "try again later")  # type: ignore[call-overload]  # a status or a word
        raise CheckpointError(f"{name}: {hub} answered {status}: {hint}") from error


def _unreachable(name: str, error: BaseException) -> str:
    return (
        f"{name}: {endpoint()} cannot be reached ({type(error).__name__}); check the network and "
        "HF_ENDPOINT, or name the folder of a bundle"
    )
