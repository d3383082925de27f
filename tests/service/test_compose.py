"""docker-compose.yml and the images against the code that they run. No engine: files, settings, metadata."""

import ast
import importlib.metadata
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.cli import app
from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What our processes' libraries read by themselves, and what the images of others document.
OF_LIBRARIES = {
    "PYTHONUNBUFFERED": "the interpreter: logs appear as they are written",
    "PIP_NO_CACHE_DIR": "pip, while the image is built",
    "PIP_DISABLE_PIP_VERSION_CHECK": "pip, while the image is built",
    "HF_HOME": "huggingface_hub: where pinned revisions of Hub models are kept",
    "TOKENIZERS_PARALLELISM": "tokenizers: no thread pool in a process that forks",
    **dict.fromkeys(
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"),
        "botocore, under s3fs",
    ),
}
OF_IMAGES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "SERVICE_PASSWORD"},  # the last: our script there
    "grafana": {"GF_SECURITY_ADMIN_PASSWORD", "GF_ANALYTICS_REPORTING_ENABLED", "GF_ANALYTICS_CHECK_FOR_UPDATES"}
    | {"GF_USERS_DEFAULT_THEME", "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"},
}
TORCH_CHOICES = ("docker/worker.Dockerfile", "docker-compose.yml", "docker/example.env")
GIVEN = {"POSTGRES_PASSWORD": "owners", "SERVICE_PASSWORD": "services", "MASTER_KEY": "secret"}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<how>[-?])(?P<word>[^}]*))?\}")


def text(path: str) -> str:
    return (ROOT / path).read_text()


def substituted(value: Any, given: Mapping[str, str]) -> str:
    """A value of the compose file as the engine would pass it on: ${NAME:-default} and ${NAME:?message}."""

    def one(match: re.Match[str]) -> str:
        name, how, word = match["name"], match["how"], match["word"]
        if given.get(name):
            return given[name]
        assert how == "-", f"{name} is required"
        return str(word)

    return VARIABLE.sub(one, str(value))


def dockerfile_of(name: str) -> Path:
    return ROOT / str(SERVICES[name]["build"]["dockerfile"])


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that a container of this service would read: the image's environment beneath the compose file's."""
    with monkeypatch.context() as patch:
        for field in Settings.model_fields:
            patch.delenv(field.upper(), raising=False)
        for key, value in (image_environment(dockerfile_of(name)) | SERVICES[name]["environment"]).items():
            if value is not None:  # else it is passed on where it is set
                patch.setenv(key, substituted(value, GIVEN))
        return Settings()


def mounts_of(name: str) -> list[tuple[str, str, bool]]:
    """(source, target, writable) of each volume, in both of the file's notations."""
    mounts = []
    for volume in SERVICES[name].get("volumes", []):
        if isinstance(volume, dict):
            mounts.append((substituted(volume["source"], {}), volume["target"], not volume.get("read_only", False)))
        else:
            source, target, *mode = volume.split(":")
            mounts.append((source, target, mode != ["ro"]))
    return mounts


# --- images


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """(KEYWORD, rest) per instruction, comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, rest = line.split(maxsplit=1)
        yield keyword, rest


def values(dockerfile: Path, keyword: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == keyword]


def image_environment(dockerfile: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in values(dockerfile, "ENV") for pair in shlex.split(rest))


def extras_installed(dockerfile: Path) -> set[str]:
    words = [word for rest in values(dockerfile, "RUN") if "pip install" in rest for word in shlex.split(rest)]
    return {extra for word in words if word.startswith(".[") for extra in word[2:-1].split(",")}


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of everything that pip installs for these, by the metadata of what the suite runs with."""
    todo = [Requirement(line) for line in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for found, extra in seen if found == name}:
            seen.add((name, extra))
            required = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            todo += [r for r in required if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_copies_what_exists_and_is_not_root(dockerfile: Path) -> None:
    ignore = [line for line in text(".dockerignore").splitlines() if line and not line.startswith("#")]
    kept = {line[1:] for line in ignore if line.startswith("!")}
    for rest in values(dockerfile, "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in kept, f"{source} is left out by .dockerignore"
    assert values(dockerfile, "USER")[-1] not in {"root", "0"}
    assert values(dockerfile, "HEALTHCHECK")
    assert set(image_environment(dockerfile)) <= {*map(str.upper, Settings.model_fields), *OF_LIBRARIES}


def test_every_package_of_the_project_is_in_the_images() -> None:
    find = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for dockerfile in DOCKERFILES:
        copied = {source for rest in values(dockerfile, "COPY") for source in rest.split()[:-1]}
        assert {pattern.rstrip("*") for pattern in find} <= copied


@pytest.mark.parametrize(
    ("image", "extra", "never"),
    [("service", "service", {"torch", "transformers", "peft", "numpy"}), ("worker", "worker", {"fastapi", "uvicorn"})],
)
def test_an_image_lacks_what_the_other_plane_needs(image: str, extra: str, never: set[str]) -> None:
    dockerfile = ROOT / f"docker/{image}.Dockerfile"
    assert extras_installed(dockerfile) == {extra, "s3"}
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = closure([*PYPROJECT["project"]["dependencies"], *extras[extra], *extras["s3"]])
    assert not installed & never
    pinned = {canonicalize_name(line.split("==")[0]) for line in text("constraints.txt").splitlines() if "==" in line}
    assert installed - pinned <= closure(["torch"]), "TORCH_INSTALL_ARGS chooses torch, constraints.txt all the rest"


def test_the_images_take_the_torch_that_was_tested() -> None:
    pins = {pin for path in ("Makefile", *TORCH_CHOICES) for pin in re.findall(r"torch==[\w.+]+", text(path))}
    assert len(pins) == 1, pins
    assert all("torch==" in text(path) for path in TORCH_CHOICES)


# --- compose


def test_every_variable_is_in_the_example_and_the_secrets_have_no_default() -> None:
    used = {match["name"]: match["how"] for match in VARIABLE.finditer(text("docker-compose.yml"))}
    example = {line.split("=")[0] for line in text("docker/example.env").splitlines() if re.match(r"\w+=", line)}
    assert used.keys() == example
    secret = {name for name in used if "PASSWORD" in name} | {"MASTER_KEY"}
    assert {name for name, how in used.items() if how == "?"} == secret
    assert set(used.values()) <= {"-", "?"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_environment_variable_has_a_reader(name: str) -> None:
    given = set(SERVICES[name].get("environment", {}))
    known = {*map(str.upper, Settings.model_fields), *OF_LIBRARIES} if name in OURS else OF_IMAGES.get(name, set())
    assert given <= known, f"nothing reads {sorted(given - known)}"


@pytest.mark.parametrize("name", OURS)
def test_the_settings_accept_what_a_service_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    who = "unlearn:owners" if name == "migrate" else "unlearn_service:services"
    assert settings.database_url == f"postgresql+psycopg://{who}@postgres:5432/unlearn"
    assert name == "migrate" or settings.broker_url.startswith("redis://redis:6379/")
    assert set(settings.worker_gpu_classes) <= set(settings.gpu_classes), "a class without a bell queue is never rung"


def test_api_and_workers_share_storage_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("api", "sweep", "worker-gpu", "worker-cpu"):
        settings = settings_of(name, monkeypatch)
        mounts = {target: (source, writable) for source, target, writable in mounts_of(name)}
        assert mounts[settings.storage_url] == ("storage", True)
        if name != "sweep":
            assert mounts[str(settings.models_root)] == ("./models", False)
        if name.startswith("worker"):
            assert mounts[str(settings.worker_scratch_dir)][1]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_and_waits_for_exists(name: str) -> None:
    for source, _, _ in mounts_of(name):
        assert source in COMPOSE["volumes"] or source == "./models" or (ROOT / source).exists(), source
    waits = SERVICES[name].get("depends_on", {})
    assert set(waits) <= set(SERVICES)
    for other, how in waits.items() if isinstance(waits, dict) else ():
        healthy = how["condition"] == "service_healthy"
        assert not healthy or "healthcheck" in SERVICES[other], f"{other} tells nobody that it is healthy"


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_hardened_and_write_to_volumes_alone(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    made = " ".join(values(dockerfile_of(name), "RUN"))
    for source, target, writable in mounts_of(name):
        if writable:
            assert source in COMPOSE["volumes"]
            assert target in shlex.split(made), f"{target} would belong to root"


@pytest.mark.parametrize("name", OURS)
def test_the_command_of_a_service_exists(name: str) -> None:
    command = SERVICES[name].get("command") or json.loads(values(dockerfile_of(name), "CMD")[-1])
    match command:
        case ["unlearn", subcommand, *options]:
            known = typer.main.get_group(app).commands[subcommand].params
            assert {word for word in options if word.startswith("-")} <= {name for one in known for name in one.opts}
        case ["python", "-m", module]:
            tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
            assert any(
                isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body
            )
        case _:
            pytest.fail(f"{command} is neither `unlearn ...` nor a module")


def test_ports_are_published_on_the_loopback_address_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), "the API has no keys"


def test_the_broker_evicts_nothing() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_each_worker_profile_runs_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile, device in (("gpu", "cuda"), ("cpu", "cpu")):
        settings = settings_of(f"worker-{profile}", monkeypatch)
        assert SERVICES[f"worker-{profile}"]["profiles"] == [profile]
        assert settings.worker_gpu_classes == [profile]
        assert settings.worker_device == device
    [device_request] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device_request["capabilities"] == ["gpu"]
    assert device_request["count"] == SERVICES["worker-gpu"]["environment"]["WORKER_SLOTS"], "one job per accelerator"


# --- Prometheus and Grafana: what they reach; what they show is in test_monitoring.py


def targets() -> Iterator[tuple[str, int]]:
    for scrape in yaml.safe_load(text("docker/prometheus/prometheus.yml"))["scrape_configs"]:
        for group in scrape.get("static_configs", ()):
            for target in group["targets"]:
                host, port = target.split(":")
                yield host, int(port)
        for group in scrape.get("dns_sd_configs", ()):
            yield from ((host, group["port"]) for host in group["names"])


def test_every_target_is_a_port_that_a_service_of_ours_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """...on an address that other containers reach, by the settings of that container."""
    for host, port in targets():
        settings = settings_of(host, monkeypatch)
        own = (settings.worker_metrics_host, settings.worker_metrics_port)
        served = {
            "api": (settings.api_host, settings.api_port),
            "sweep": (settings.sweep_metrics_host, settings.sweep_metrics_port),
        }.get(host, own)
        assert served == ("0.0.0.0", port), f"{host} serves {served}"
        assert str(port) in " ".join(values(dockerfile_of(host), "EXPOSE")).split()
        command = ["python", "-m", "service.sweep"] if host == "sweep" else None
        assert SERVICES[host].get("command") == command, "else the image's own command serves it"


def test_every_process_that_exports_figures_is_a_target() -> None:
    assert {host for host, _ in targets()} == set(OURS) - {"migrate"}


def test_grafana_asks_the_prometheus_of_the_compose_file() -> None:
    provisioned = ROOT / "docker/grafana/provisioning"
    [source] = yaml.safe_load((provisioned / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert any(port.endswith(":9090") for port in SERVICES["prometheus"]["ports"])
    [provider] = yaml.safe_load((provisioned / "dashboards/unlearning.yaml").read_text())["providers"]
    mounted = {target: source for source, target, _ in mounts_of("grafana")}
    assert ROOT / mounted[provider["options"]["path"]] == ROOT / "docker/grafana/dashboards"
    assert ROOT / mounted["/etc/grafana/provisioning"] == provisioned
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert (ROOT / mounted[str(home.parent)] / home.name).exists()


def test_a_worker_that_is_stopped_has_time_for_its_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for profile in ("gpu", "cpu"):
        settings = settings_of(f"worker-{profile}", monkeypatch)
        engine_waits_s = int(SERVICES[f"worker-{profile}"]["stop_grace_period"].removesuffix("s"))
        assert settings.drain_grace_s + settings.term_grace_s + settings.lease_s / 4 <= engine_waits_s
