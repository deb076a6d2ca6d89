"""`raysae push`: the best SAE of a search, with its model card, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from raysae.errors import UserError
from raysae.model_card import CARD, write_card

SAE_ID = "sae"
"""Folder in the repository: `SAE.from_pretrained(REPO_ID, "sae")` wants one."""


def push_best(run_dir: Path, repo_id: str, console: Console, *, private: bool = True) -> str:
    """Create the repository if it is not there, upload `best/` and return its address.

    The card lies at the root, where the hub looks for it, the SAE in a folder, where SAELens does.

    Args:
        run_dir: of a search that is over.
        repo_id: USER/NAME.
        console: to print to.
        private: whether a new repository is.

    Raises:
        UserError: no best SAE there, no token, a bad name, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    best = run_dir / "best"
    if not (best / "cfg.json").is_file():
        raise UserError(
            f"{run_dir}: no best SAE there (best/cfg.json); a search makes it when it ends"
        )
    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("it has to be USER/NAME")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: no name of a repository: {error}") from None
    token = get_token()
    if token is None:
        raise UserError(
            "the hub wants a token: run `hf auth login`, or set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    card = write_card(run_dir, repo_id=repo_id, sae_id=SAE_ID)
    api: Any = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=best,
            path_in_repo=SAE_ID,
            ignore_patterns=[CARD],
            commit_message=f"SAE of {run_dir.name}",
        )
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=card,
            path_in_repo=CARD,
            commit_message="Model card",
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{repo_id}: the hub refuses: {str(error).splitlines()[0]}") from None
    address = f"https://huggingface.co/{repo_id}"
    console.print(
        f'{address}\nSAE.from_pretrained("{repo_id}", "{SAE_ID}")', highlight=False, soft_wrap=True
    )
    return address
