"""What Snakemake's plugin asks of Kubernetes' API, answered by this machine: a pod is a process. It is no cluster.

Objects are read by the models of the official Python client, and refused as an API server refuses them. Everything
behind the API is played: one node on which pods wait until what they ask for is free, a controller that does nothing
again, an image that is this machine's Python. Limits are compared and not enforced.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kubernetes.client import ApiClient
from kubernetes.utils.quantity import parse_quantity

from tests.cluster.daemons import descendants, kill

TOKEN = "a-token"
# RFC 1123, as Kubernetes has it.
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
SUBDOMAIN = rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*"
NATIVE = {"cpu", "memory", "ephemeral-storage"}
NODE = {"cpu": "4", "memory": "64G", "ephemeral-storage": "64G", "nvidia.com/gpu": "1"}


class RefusedError(Exception):
    """An answer that is an error: its HTTP status, its reason and its sentence."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self.status |= {"reason": reason, "message": message}


@dataclass
class Pod:
    """A pod of a job; `process` is None until there is room for it."""

    job: str
    spec: dict[str, Any]
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return f"{self.job}-00000"

    @property
    def container(self) -> dict[str, Any]:
        return self.spec["containers"][0]

    @property
    def rule(self) -> str:
        """The rule of Snakemake whose job it does."""
        return re.search(r"--target-jobs '?(\w+):", self.container["args"][1])[1]

    @property
    def log(self) -> str:
        written = self.folder / "log"
        return written.read_text() if written.exists() else ""

    def exit_code(self) -> int | None:
        """None as long as it waits or runs; 137 for SIGKILL, as a container's."""
        code = self.process and self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def phase(self) -> str:
        if self.process is None:
            return "Pending"
        return {None: "Running", 0: "Succeeded"}.get(self.exit_code(), "Failed")

    def kill(self) -> None:
        """All of it ends at once, as when the node has no memory left."""
        if self.process is None:
            return
        started = [self.process.pid, *descendants(self.process.pid)]
        for pid in started:
            kill(pid)
        self.process.wait()

    def described(self) -> dict[str, Any]:
        """It as the API shows it."""
        phase, code = self.phase(), self.exit_code()
        status: dict[str, Any] = {"phase": phase}
        if phase != "Pending":
            ended = {"exitCode": code, "reason": "Error" if code else "Completed", "containerID": f"test://{self.name}"}
            state = {"running": {}} if code is None else {"terminated": ended}
            told = {"name": self.container["name"], "image": self.container["image"], "imageID": "", "lastState": {}}
            status["containerStatuses"] = [{**told, "ready": code is None, "restartCount": 0, "state": state}]
        return {"metadata": {"name": self.name, "labels": {"job-name": self.job}}, "spec": self.spec, "status": status}


@dataclass
class Cluster:
    """One namespace of a cluster of one node, whose pods get the variables of an image; `kubeconfig` leads there."""

    folder: Path
    namespace: str
    image: dict[str, str]
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    # All pods that there ever were, in their order.
    history: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.client = ApiClient()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.address = "http://{}:{}".format(*self.server.server_address)

    def start(self) -> None:
        self.folder.mkdir()
        self.thread.start()
        self.kubeconfig = self.folder / "config"
        config = {
            "clusters": [{"name": "test", "cluster": {"server": self.address}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **config}))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        for pod in self.pods.values():
            pod.kill()

    def answer(self, method: str, address: str, authorization: str | None, body: Any) -> tuple[int, Any]:
        """The HTTP status and the content of the answer."""
        asked = urlsplit(address)
        try:
            if authorization != f"Bearer {TOKEN}":
                raise RefusedError(401, "Unauthorized", "Unauthorized")
            for verb, pattern, respond in ROUTES:
                found = re.fullmatch(pattern, asked.path)
                if verb == method and found:
                    namespace, *names = found.groups()
                    if namespace != self.namespace:
                        raise RefusedError(404, "NotFound", f'namespaces "{namespace}" not found')
                    with self.lock:
                        self.schedule()
                        return 200, respond(self, *names, query=dict(parse_qsl(asked.query)), body=body)
            raise RefusedError(404, "NotFound", "the server could not find the requested resource")
        except RefusedError as refusal:
            return refusal.code, refusal.status

    def accept(self, body: Any, model: str, faults: Callable[[dict], Iterator[str]], others: dict) -> str:
        """The name of a new object; raises `RefusedError` for one that is broken, or there already."""
        try:
            read = self.client.deserialize(SimpleNamespace(data=json.dumps(body)), model)
        except ValueError as error:
            raise RefusedError(400, "BadRequest", str(error)) from None
        if self.client.sanitize_for_serialization(read) != body:
            raise RefusedError(400, "BadRequest", f"strict decoding error: fields that {model} does not have")
        name = body["metadata"]["name"]
        found = list(faults(body))
        if not re.fullmatch(SUBDOMAIN, name):
            found.append(f"metadata.name: Invalid value: {name!r}: a lowercase RFC 1123 subdomain")
        if found:
            raise RefusedError(422, "Invalid", f"{model} {name!r} is invalid: {found}")
        if name in others:
            raise RefusedError(409, "AlreadyExists", f"{name!r} already exists")
        return name

    def create_secret(self, query: dict, body: Any) -> Any:
        name = self.accept(body, "V1Secret", secret_faults, self.secrets)
        self.secrets[name] = {key: base64.b64decode(value).decode() for key, value in body["data"].items()}
        return body

    def delete_secret(self, name: str, query: dict, body: Any) -> Any:
        known(self.secrets, name, "secrets")
        del self.secrets[name]
        return {"kind": "Status", "status": "Success"}

    def create_job(self, query: dict, body: Any) -> Any:
        name = self.accept(body, "V1Job", job_faults, self.jobs)
        self.jobs[name] = body
        pod = Pod(name, body["spec"]["template"]["spec"], self.folder / name)
        self.pods[pod.name] = pod
        self.history.append(pod)
        return body

    def job_status(self, name: str, query: dict, body: Any) -> Any:
        """A pod that failed, or is gone, is a failure; with a `backoffLimit` of 0 there is no second one."""
        pod = self.pods.get(Pod(name, {}, self.folder).name)
        phase = pod.phase() if pod else "Failed"
        counted = {"Succeeded": "succeeded", "Failed": "failed"}.get(phase, "active")
        return {**known(self.jobs, name, "jobs.batch"), "status": {counted: 1}}

    def delete_job(self, name: str, query: dict, body: Any) -> Any:
        known(self.jobs, name, "jobs.batch")
        del self.jobs[name]
        for pod in [pod for pod in self.pods.values() if pod.job == name]:
            self.delete_pod(pod.name)
        return {"kind": "Status", "status": "Success"}

    def list_pods(self, query: dict, body: Any) -> Any:
        job = query["labelSelector"].removeprefix("job-name=")
        found = [pod.described() for pod in self.pods.values() if pod.job == job]
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found}

    def delete_pod(self, name: str, query: dict | None = None, body: Any = None) -> Any:
        """Also what an eviction is, or a node that is drained."""
        pod = known(self.pods, name, "pods")
        pod.kill()
        return self.pods.pop(name).described()

    def pod_log(self, name: str, query: dict, body: Any) -> str:
        """A container that is never started again has no earlier log, which is an error to ask for."""
        pod = known(self.pods, name, "pods")
        container = query["container"]
        # A server takes all for true that is neither; the client writes `True`.
        if query.get("previous", "false").lower() not in ("false", "0"):
            said = f"previous terminated container {container!r} in pod {name!r} not found"
            raise RefusedError(400, "BadRequest", said)
        return pod.log

    def schedule(self) -> None:
        """Pods start in their order, each when what it asks for is free."""
        free = {name: parse_quantity(amount) for name, amount in NODE.items()}
        for pod in self.pods.values():
            asked = {name: parse_quantity(amount) for name, amount in pod.container["resources"]["requests"].items()}
            if pod.phase() in ("Succeeded", "Failed") or any(asked[name] > free[name] for name in asked):
                continue
            for name in asked:
                free[name] -= asked[name]
            if pod.process is None:
                self.run(pod)

    def run(self, pod: Pod) -> None:
        """Starts a pod in a working directory of its own, which is empty as the volume that is mounted there."""
        workdir = pod.folder / "workdir"
        workdir.mkdir(parents=True)
        variables = {"HOME": str(pod.folder), **self.image}
        for variable in pod.container["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            variables[variable["name"]] = self.secrets[reference["name"]][reference["key"]]
        words = [*pod.container["command"], *pod.container["args"]]
        with (pod.folder / "log").open("w") as log:
            pod.process = subprocess.Popen(
                words, cwd=workdir, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )


NAMESPACED = r"/api/v1/namespaces/([^/]+)"
BATCH = r"/apis/batch/v1/namespaces/([^/]+)/jobs"
ROUTES = [
    ("POST", rf"{NAMESPACED}/secrets", Cluster.create_secret),
    ("DELETE", rf"{NAMESPACED}/secrets/([^/]+)", Cluster.delete_secret),
    ("POST", BATCH, Cluster.create_job),
    ("GET", rf"{BATCH}/([^/]+)/status", Cluster.job_status),
    ("DELETE", rf"{BATCH}/([^/]+)", Cluster.delete_job),
    ("GET", rf"{NAMESPACED}/pods", Cluster.list_pods),
    ("DELETE", rf"{NAMESPACED}/pods/([^/]+)", Cluster.delete_pod),
    ("GET", rf"{NAMESPACED}/pods/([^/]+)/log", Cluster.pod_log),
]


def handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, content = cluster.answer(self.command, self.path, self.headers.get("Authorization"), body)
            kind = "text/plain" if isinstance(content, str) else "application/json"
            sent = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        # The names that http.server looks for.
        do_GET = do_POST = do_DELETE = respond  # noqa: N815

        def log_message(self, *words: Any) -> None:
            pass

    return Handler


def known(objects: dict[str, Any], name: str, kind: str) -> Any:
    if name not in objects:
        raise RefusedError(404, "NotFound", f'{kind} "{name}" not found')
    return objects[name]


def secret_faults(secret: dict[str, Any]) -> Iterator[str]:
    size = 0
    for key, value in secret.get("data", {}).items():
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key):
            yield f"data[{key}]: Invalid value"
        try:
            size += len(base64.b64decode(value, validate=True))
        except binascii.Error:
            yield f"data[{key}]: illegal base64 data"
    if size > 2**20:
        yield "data: Too long: at most 1 MiB"


def job_faults(job: dict[str, Any]) -> Iterator[str]:
    # The job's name becomes a label of its pods.
    if not re.fullmatch(LABEL, job["metadata"]["name"]):
        yield "spec.template.labels: Invalid value: a label of at most 63 characters"
    pod = job["spec"]["template"]["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.template.spec.restartPolicy: Required value: `OnFailure` or `Never`"
    for toleration in pod.get("tolerations", []):
        if toleration["effect"] not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
            yield "spec.template.spec.tolerations: Unsupported value"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        where = f"containers[{container['name']}]"
        if not re.fullmatch(LABEL, container["name"]):
            yield f"{where}.name: Invalid value: a lowercase RFC 1123 label"
        if not container.get("image"):
            yield f"{where}.image: Required value"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes or not os.path.isabs(mount["mountPath"]):
                yield f"{where}.volumeMounts: Not found: {mount['name']}"
        for variable in container.get("env", []):
            if not re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", variable["name"]):
                yield f"{where}.env: Invalid value: {variable['name']!r}"
        for fault in resource_faults(container.get("resources", {})):
            yield f"{where}.resources.{fault}"


def resource_faults(resources: dict[str, dict[str, str]]) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    amounts = {}
    for kind, asked in (("requests", requests), ("limits", limits)):
        for name, amount in asked.items():
            try:
                amounts[kind, name] = parse_quantity(amount)
            except ValueError:
                yield f"{kind}[{name}]: Invalid value: {amount!r}: no quantity"
                return
            if amounts[kind, name] < 0:
                yield f"{kind}[{name}]: must be greater than or equal to 0"
            if name not in NATIVE and "/" not in name:
                yield f"{kind}[{name}]: must be a standard resource for containers"
            if "/" in name and amounts[kind, name] % 1:
                yield f"{kind}[{name}]: must be an integer"
    for name in requests:
        limit = amounts.get(("limits", name))
        if "/" in name and limit is None:
            yield f"limits[{name}]: Required value: Limit must be set for non overcommitable resources"
        elif "/" in name and limit != amounts["requests", name]:
            yield f"requests[{name}]: must be equal to {name} limit"
        elif limit is not None and amounts["requests", name] > limit:
            yield f"requests[{name}]: must be less than or equal to {name} limit"
