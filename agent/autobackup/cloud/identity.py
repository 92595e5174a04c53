"""
Keystone: tokens, roles and the catalogue, through openstacksdk's reading of clouds.yaml. Blocks; a thread's work.

Keystone answers the same 401 to a wrong password, a project that does not exist and one where we have no role. What
it was is found out by asking for a token without a project, and for the list of projects that would have us.
"""

import re
import ssl
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from autobackup.errors import CloudUnavailable, ConfigError, NoRole

REQUIRED_ROLES: Final = ("member", "creator", "autobackup")
"""What whoever administers a project grants us there: `member` for Glance, `creator` for the Barbicans that still go
by it, and our own, `autobackup`, which is the consent."""


_SECRETS: Final = frozenset({"password", "application_credential_secret", "token", "passcode"})
_VERSION: Final = re.compile(r"/v\d[\d.]*(/[0-9a-f]{32})?$")
_NONSENSE: Final = "what it said is not what Keystone says; make sure that it is Keystone that answers there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a token says. *delegated*: a trust or an application credential, so its roles are its giver's to choose."""

    user_id: str
    user_name: str
    project_id: str
    project_name: str
    roles: frozenset[str]
    delegated: bool

    @property
    def missing_roles(self) -> tuple[str, ...]:
        return () if self.delegated else tuple(role for role in REQUIRED_ROLES if role not in self.roles)


class Credentials:
    """One entry of clouds.yaml, scoped to one project."""

    def __init__(
        self, *, cloud: str, project: str, project_domain: str, clouds_yaml: Path | None, timeout_s: float, place: str
    ) -> None:
        self._cloud = cloud
        self._project = project
        self._project_domain = project_domain
        self._clouds_yaml = clouds_yaml
        self._timeout_s = timeout_s
        self._place = place
        self._lock = threading.Lock()
        self._region: Any = None
        self._session: Any = None
        self._tls: ssl.SSLContext | bool | None = None
        self._endpoints: dict[str, str] = {}

    def ready(self) -> None:
        """Read clouds.yaml, once. `ConfigError` if it is wrong."""
        with self._lock:
            if self._session is None:
                self._region = self._open(project=self._project)
                self._tls = self._read_tls()
                auth = self._region.config.get("auth", {})
                if auth.keys() & {"username", "user_id"} and not auth.keys() & _SECRETS:
                    raise ConfigError(f"{self._place}: its entry in clouds.yaml has no auth.password; add it")
                self._session = self._region.get_session()

    def access(self) -> Access:
        """Who we are. Raises `CloudUnavailable` with the remedy, `ConfigError` for clouds.yaml itself."""

        def ask() -> Access:
            known = self._session.auth.get_access(self._session)
            return Access(
                user_id=known.user_id,
                user_name=known.username or "",
                project_id=known.project_id or "",
                project_name=known.project_name or "",
                roles=frozenset(known.role_names or ()),
                delegated=bool(known.trust_scoped or known.application_credential_id),
            )

        access: Access = self._ask(ask)
        return access

    def access_now(self) -> Access:
        """As `access`, with the roles that Keystone sees in our token now; a delegated one is its giver's."""
        access = self.access()
        return access if access.delegated else replace(access, roles=self._ask(self._roles_now))

    def token_and_endpoint(self, service: str) -> tuple[str, str]:
        """A token that is good for a while, and the URL of *service* without a version in its path."""
        token = self._ask(lambda: self._session.get_token())
        if service not in self._endpoints:
            self._endpoints[service] = self._endpoint(service)
        return token, self._endpoints[service]

    def forget(self) -> None:
        """The token was refused: the next call gets a new one, and a fresh catalogue."""
        if self._session is not None:
            self._session.invalidate()
        self._endpoints.clear()

    def tls(self) -> ssl.SSLContext | bool:
        """What aiohttp calls `ssl=`."""
        self.ready()
        assert self._tls is not None
        return self._tls

    # ---- inside -----------------------------------------------------------------------------------------

    def _open(self, *, project: str) -> Any:
        # 20 MiB of modules, and a tenth of a second: only for who has a cloud
        from keystoneauth1 import exceptions
        from openstack.config import OpenStackConfig
        from openstack.exceptions import ConfigException

        files = [str(self._clouds_yaml)] if self._clouds_yaml is not None else None
        where = f"{self._place}: {files[0] if files else 'clouds.yaml'}"
        if self._clouds_yaml is not None:
            _require_shape(self._clouds_yaml, self._cloud)
        scope: dict[str, Any] = {}
        if project:
            scope = {"project_id": project} if _is_id(project) else {"project_name": project}
            if self._project_domain:
                domain = self._project_domain
                scope["project_domain_id" if _is_id(domain) or domain == "default" else "project_domain_name"] = domain
        try:
            found = OpenStackConfig(config_files=files, load_envvars=self._clouds_yaml is None)
            return found.get_one(cloud=self._cloud, api_timeout=self._timeout_s, app_name="autobackup", **scope)
        except (ConfigException, exceptions.ClientException) as exc:
            raise ConfigError(f"{where}: {exc}") from exc
        except (TypeError, ValueError, KeyError, AttributeError) as exc:
            # the SDK's own surprise, whose text may show a value
            raise ConfigError(f"{where}: openstacksdk cannot read this cloud's entry ({type(exc).__name__})") from None

    def _read_tls(self) -> ssl.SSLContext | bool:
        """Read once: a context takes 20 ms to make."""
        verify, certificate = self._region.get_requests_verify_args()
        if verify is False:
            return False
        authorities = verify if isinstance(verify, str) else None
        pair = (certificate,) if isinstance(certificate, str) else tuple(certificate or ())
        path: str | None = authorities
        try:
            context = ssl.create_default_context(cafile=authorities)
            path = " or ".join(pair)
            if pair:
                context.load_cert_chain(*pair)
        except OSError as exc:  # ssl.SSLError is one
            raise ConfigError(f"{self._place}: {path}: {exc.strerror or exc}; mend its entry in clouds.yaml") from exc
        return context

    def _ask(self, question: Any) -> Any:
        from keystoneauth1 import exceptions

        self.ready()
        try:
            return question()
        except exceptions.Unauthorized as exc:
            words, is_no_role = self._why_unauthorized()
            kind = NoRole if is_no_role else CloudUnavailable
            raise kind(f"{self._place}: {words}") from exc
        except exceptions.RetriableConnectionFailure as exc:
            remedy = "make sure that it runs and can be reached from this host"
            raise CloudUnavailable(f"{self._place}: Keystone: {exc}; {remedy}") from exc
        except exceptions.HttpError as exc:
            after = _number((exc.response.headers if exc.response is not None else {}).get("Retry-After"))
            remedy = "; make sure of this cloud's entry in clouds.yaml" if isinstance(exc, exceptions.NotFound) else ""
            raise CloudUnavailable(f"{self._place}: Keystone: {exc}{remedy}", retry_after_s=after) from exc
        except exceptions.CatalogException as exc:
            raise CloudUnavailable(f"{self._place}: {exc}") from exc
        except exceptions.InvalidResponse as exc:
            raise CloudUnavailable(f"{self._place}: Keystone: {_NONSENSE}") from exc
        except exceptions.ClientException as exc:  # a missing option, a plugin that is not there
            raise ConfigError(f"{self._place}: {exc}; mend its entry in clouds.yaml") from exc
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # keystoneauth looks at nothing twice
            raise CloudUnavailable(f"{self._place}: Keystone: {_NONSENSE}") from None
        except Exception as exc:
            if type(exc) is not Exception:
                raise
            # keystoneauth has no better one for an option that its plugin lacks
            raise ConfigError(f"{self._place}: {exc}; mend its entry in clouds.yaml") from None

    def _endpoint(self, service: str) -> str:
        from keystoneauth1 import exceptions

        region = self._region

        def ask() -> Any:
            try:
                return self._session.auth.get_endpoint(
                    self._session,
                    service_type=region.get_service_type(service),
                    interface=region.get_interface(service),
                    region_name=region.get_region_name(service),
                )
            except exceptions.CatalogException:
                return None

        found = region.get_endpoint(service) or self._ask(ask)
        if not found:
            where = f"region {region.get_region_name(service)!r}, interface {region.get_interface(service)!r}"
            remedy = "whoever runs the cloud can tell what it has; it is chosen in clouds.yaml"
            raise CloudUnavailable(f"{self._place}: the catalogue has no {service} service in {where}; {remedy}")
        return _without_version(str(found))

    def _roles_now(self) -> frozenset[str]:
        from keystoneauth1 import exceptions

        def ask() -> Any:
            headers = {"X-Subject-Token": self._session.get_token()}
            return self._session.get(f"{self._keystone()}/auth/tokens", headers=headers)

        try:
            said = ask()
        except exceptions.NotFound:  # the token was revoked
            self._session.invalidate()
            said = ask()
        return frozenset(role["name"] for role in said.json()["token"]["roles"])

    def _keystone(self) -> str:
        url = str(self._region.config.get("auth", {}).get("auth_url", "")).rstrip("/")
        return url if url.endswith("/v3") else f"{url}/v3"

    def _why_unauthorized(self) -> tuple[str, bool]:
        """Which of the things that one 401 may mean, and whether it is that nobody has given us a role there."""
        from keystoneauth1 import exceptions
        from keystoneauth1.identity import v3

        auth = self._region.config.get("auth", {})
        if not self._project or not auth.keys() & {"username", "user_id"}:
            words = (
                "Keystone refuses what clouds.yaml says of us: a wrong password or secret, or one that was revoked, "
            )
            return f"{words}or whoever gave it has lost the role in it", False
        known = ("auth_url", "username", "user_id", "password", "user_domain_id", "user_domain_name")
        unscoped = v3.Password(unscoped=True, **{key: auth[key] for key in known if key in auth})
        try:
            answer = self._session.get(f"{self._keystone()}/auth/projects", auth=unscoped)
            projects = sorted(project["name"] for project in answer.json()["projects"])
        except exceptions.Unauthorized:
            return "Keystone refuses our name or password; mend this cloud's entry in clouds.yaml", False
        except (exceptions.ClientException, ValueError, KeyError, TypeError, RecursionError):
            return "Keystone refuses us there, and did not say more", False
        user = auth.get("username") or auth.get("user_id")
        listed = ", ".join(projects) or "none"
        words = f"we have no role there, or it does not exist; {grants(user, self._project)}"
        return f"{words}; projects where we have a role: {listed}", True


def _require_shape(path: Path, cloud: str) -> None:
    """openstacksdk skips what it cannot parse, and logs why: with a line that may be a password's."""
    import yaml  # type: ignore[import-untyped]

    try:
        said = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"openstack.clouds_yaml: {path}: no such file") from None
    except OSError as exc:
        raise ConfigError(f"openstack.clouds_yaml: {path}: {exc.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"openstack.clouds_yaml: {path}{where}: this is not YAML") from None
    for key in ("clouds", cloud, "auth"):
        if not isinstance(said, dict) or not isinstance(said.get(key, {}), dict):
            raise ConfigError(f"openstack.clouds_yaml: {path}: {key} must be a mapping in a mapping")
        said = said.get(key, {})


def grants(user: str, project: str, roles: tuple[str, ...] = REQUIRED_ROLES) -> str:
    """What to ask for."""
    commands = "; ".join(f"openstack role add --user {user} --project {project} {role}" for role in roles)
    return f"whoever administers it can make the grant: {commands}"


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)


def _without_version(url: str) -> str:
    """Nova's URL may end in the project's id, after the version."""
    return _VERSION.sub("", url.rstrip("/"))


def _number(text: str | None) -> float | None:
    return float(text) if text and text.isascii() and text.isdigit() else None
