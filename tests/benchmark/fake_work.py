"""A `Work` for tests: it logs every call, and fails on request."""

import os
import sys

import __main__  # `capsnet_benchmark.worker`

__main__.SHORTEST = 0.0  # no call is repeated


class Work:
    platform, device = "cpu", "cpu"

    def __init__(self, name="fake", log=os.devnull, trouble=(), **others):
        self.name, self.log, self.trouble = name, log, trouble

    def prepare(self, name):
        print("This is not a reply.")
        if name in self.trouble:
            getattr(self, self.trouble[name])()
        return [(lambda: self.call(name), 1)]

    def call(self, name):
        with open(self.log, "a") as file:
            print(self.name, name, file=file)

    def block(self, result):
        pass

    def warmed_up(self):
        pass

    def peak_device_memory(self):
        self.call("memory")
        return {"jax": 300, "torch-eager": 400, "torch-compile": 1200}.get(self.name)  # others have no device

    def error(self):
        raise RuntimeError("\nNo working compiler.\nMore of it.")

    def end(self):
        print("Out of luck.\n", file=sys.stderr, flush=True)
        os._exit(3)

    def kill(self):
        os.kill(os.getpid(), 9)
