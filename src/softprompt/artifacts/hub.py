"""Uploading saved prompts to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from softprompt.errors import ArtifactError


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Upload soft prompt",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put the files of a folder into a repository, made if needed, and return the commit's address.

    Raises:
        ArtifactError: If the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    # The hub client raises errors of its HTTP library, which share no root with its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"could not upload to {repo_id} ({reason}); check the name, the connection and `hf auth login`"
        ) from error
    return str(commit.commit_url)
