"""Each rank is a program of its own, started without a fork server."""

import json
import os
import socket
import subprocess
import sys

from benchsuite.cluster import Engine
from benchsuite.cluster.rank_imports import python_path
from benchsuite.results.record import Outcome, Status, now_iso
from benchsuite.worker.job import rank_complete

RANK = """
import json, sys
from benchsuite.worker.job import RankJob
from benchsuite.worker.main import run_rank
run_rank(RankJob(**json.loads(sys.argv[1])))
"""


class Cluster(Engine):
    """Starts ranks as programs."""

    flags = {"mark_file": "where to note which cells were run"}

    def __init__(self, mark_file=""):
        self.mark_file = mark_file

    def run(self, cell, run_dir):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        started_at = now_iso()
        ranks = [self.start_rank(cell, run_dir, port, rank) for rank in range(cell.world_size)]
        for rank in ranks:
            rank.wait(cell.budget.timeout_s)
        if self.mark_file:
            with open(self.mark_file, "a") as file:
                print(cell.label, file=file)
        if all(rank_complete(run_dir, rank) for rank in range(cell.world_size)):
            return Outcome(Status.OK, started_at=started_at)
        return Outcome(Status.FAILED, "a rank left no record", started_at=started_at)

    def start_rank(self, cell, run_dir, port, rank):
        job = {"cell": cell.to_json(), "rank": rank, "world_size": cell.world_size}
        job |= {"local_rank": rank, "run_dir": str(run_dir), "store_port": port}
        environment = {**os.environ, "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen([sys.executable, "-c", RANK, json.dumps(job)], env=environment)
