"""Children that misbehave in one way each, for ``worker.process`` to cope with. ``python -m tests.worker.odd_children KIND``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from worker.channel import open_channel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    options, channel = open_channel(parser, sys.argv[1:])
    match options.kind:
        case "echo":
            channel.say_result(work=channel.work)
        case "asks":
            channel.say_result(answers=[channel.ask({"type": "question", "question": number}) for number in (7, 8)])
        case "exit":
            os._exit(3)
        case "quiet exit":
            pass
        case "leaves a grandchild":
            channel.say_result(pid=subprocess.Popen(["sleep", "600"]).pid)
        case "dies before its grandchild":
            grandchild = subprocess.Popen(["sleep", "600"], pass_fds=[options.events])
            channel.say({"type": "stage", "pid": grandchild.pid})
            os.abort()
        case "talks without end":
            while True:
                channel.say({"type": "stage"})
        case "takes memory":
            subprocess.Popen([sys.executable, "-c", "held = b'x' * 200_000_000; import time; time.sleep(600)"])
            time.sleep(600)
        case "says half a word":
            os.write(options.events, b'{"type": "res')
        case "stays after its last word":
            channel.say_result()
            time.sleep(600)
        case "waits for its lease to pass":
            channel.stop_on_sigterm()
            end = time.monotonic() + 60  # for hangs only
            while not channel.should_stop and time.monotonic() < end:
                time.sleep(0.01)
            channel.say({"type": "stopped" if channel.should_stop else "result"})


if __name__ == "__main__":
    main()
