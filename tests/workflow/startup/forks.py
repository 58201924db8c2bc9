"""Jobs that need not import torch each: `python forks.py ADDRESS` imports it once and forks a process for every job.

Importing what a job needs takes several times as long as what it does on the models of tests.

`hand_over`, in the process that the job's shell command starts, passes its words, folder, environment and open files
on, and ends as the fork ends. The fork runs `python -m coppice` with them as a new interpreter would: Coppice itself is
imported again by each.
"""

import json
import os
import runpy
import signal
import socket
import socketserver
import sys
from importlib import import_module

PRELOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "peft.tuners.lora",
    "pandas",
    "pyarrow.parquet",
    "pydantic",
    "scipy.optimize",
    "scipy.stats",
    "mlflow.store.tracking.sqlalchemy_store",
)


def hand_over(address):
    """Runs this process's command in a fork; never returns."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"\0{address}")
        request = json.dumps([sys.orig_argv, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [request.encode()], [0, 1, 2])
        code = server.recv(1)
    if not code:  # the fork was killed
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(code[0])


class Job(socketserver.BaseRequestHandler):
    """One fork: its exit code is the answer."""

    def handle(self):
        request, files, _, _ = socket.recv_fds(self.request, 1 << 18, 3)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.orig_argv, folder, environment = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:1] = [folder, *environment["PYTHONPATH"].split(os.pathsep)]
        sys.argv[1:] = sys.orig_argv[3:]
        self.request.send(bytes([run()]))


def run():
    if "FAULTS" in os.environ:
        import faults

        faults.begin()
    try:
        runpy.run_module("coppice", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    socket_type = socket.SOCK_SEQPACKET


def serve(address):
    for module in PRELOADED:
        import_module(module)
    with Server(f"\0{address}", Job) as server:
        print("Ready.", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
