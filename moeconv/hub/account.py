"""The token's account, and whether it may write to a repository."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, get_token

from moeconv.errors import HubError
from moeconv.untrusted.text import printable

_WRITING_ROLES = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Account:
    """Whose token it is.

    Attributes:
        name: The user.
        may_write: To the repository in question; None where the Hub does not say.
        why: Of a no, or of not knowing.
    """

    name: str
    may_write: bool | None
    why: str = ""


def demand_token() -> str:
    """The token from HF_TOKEN or the stored login, which a push needs first.

    Raises:
        HubError: There is none.
    """
    token: str | None = get_token()
    if token is None:
        raise HubError(
            "there is no token; set HF_TOKEN (https://huggingface.co/settings/tokens) or "
            "run `hf auth login`"
        )
    return token


def read_account(api: HfApi, repo_id: str) -> Account:
    """Asks the Hub who the token is."""
    me = api.whoami()
    may, why = may_write(me, repo_id)
    return Account(printable(str(me.get("name", "?")))[:100], may, why)


def may_write(me: Mapping[str, Any], repo_id: str) -> tuple[bool | None, str]:
    """From the answer of whoami: whether this token may write to a repository, and why not."""
    namespace = repo_id.split("/")[0]
    name = me.get("name")
    token = (me.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        return False, "the token may only read"
    if role == "fineGrained":
        return _fine_grained(token.get("fineGrained") or {}, namespace, repo_id)
    if namespace == name:
        return True, ""
    for org in me.get("orgs") or ():
        if org.get("name") == namespace:
            in_org = org.get("roleInOrg")
            if in_org is None:
                return None, f"the Hub does not say the account's role in {namespace}"
            if in_org in _WRITING_ROLES:
                return True, ""
            # A resource group may give more (huggingface.co/docs/hub/security-resource-groups).
            return None, f"the account is only {in_org} in {namespace}"
    return False, f"{namespace} is neither the account {name} nor an organization it is in"


def _fine_grained(
    rights: Mapping[str, Any], namespace: str, repo_id: str
) -> tuple[bool | None, str]:
    for scope in rights.get("scoped") or ():
        entity = scope.get("entity") or {}
        other = entity.get("type") in ("dataset", "space")  # which may have the model's name
        writes = "repo.write" in (scope.get("permissions") or ())
        if writes and not other and entity.get("name") in (namespace, repo_id):
            return True, ""
    return False, f"the fine-grained token has no write permission (repo.write) for {repo_id}"
