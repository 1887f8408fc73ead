"""Stand-ins for the programs of SLURM, first in PATH, which do on this machine what is asked of them."""

import json
import os
import re
import subprocess
import sys

SRUN = """
import json, os, signal, subprocess, sys, time

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
with open("srun.json", "w") as file:
    json.dump(sys.argv[1:], file)
if "SRUN_STATUS" in os.environ:
    sys.exit(int(os.environ["SRUN_STATUS"]))
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for rank in range(nodes * each):
    own = {"PROCID": rank, "LOCALID": rank % each, "NODEID": rank // each, "NTASKS": nodes * each}
    environment = os.environ | {"SLURM_" + name: str(value) for name, value in own.items()}
    tasks.append(subprocess.Popen(words, env=environment, start_new_session=True))
try:
    while any(task.poll() is None for task in tasks):
        if os.path.exists("time-is-up"):
            os.remove("time-is-up")
            for task in tasks:
                os.killpg(task.pid, signal.SIGUSR1)  # the loader's workers too
        time.sleep(0.02)
finally:
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
sys.exit(max(task.returncode % 256 for task in tasks))
"""
SCONTROL = """
import sys
with open("scontrol.txt", "a") as file:
    print(*sys.argv[1:], file=file)
"""
SBATCH = """
import os, sys
with open("submitted", "w") as file:
    file.write(sys.stdin.read())
sys.exit(int(os.environ.get("SBATCH_STATUS", "0")))
"""
APPTAINER = """
import os, sys
os.execvp(sys.argv[4], sys.argv[4:])
"""
PROGRAM = """
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "lightning_igpt", *sys.argv[1:]])
"""


def install(folder):
    """The programs in a folder that is to come first in PATH."""
    folder.mkdir(exist_ok=True)
    texts = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "apptainer": APPTAINER}
    for name, text in (texts | {"lightning-igpt": PROGRAM}).items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    return folder


def batch(script, folder, **environment):
    """Start a script as sbatch does; its directives become SLURM's variables."""
    given = dict(re.findall(r"^(#SBATCH --[\w-]+)=(.*)$", script.read_text(), re.MULTILINE))
    values = {
        "SLURM_JOB_ID": "14711", "SLURM_JOB_NAME": given["#SBATCH --job-name"],
        "SLURM_NNODES": given["#SBATCH --nodes"], "SLURM_NTASKS_PER_NODE": given["#SBATCH --ntasks-per-node"],
    }  # fmt: skip
    path = f"{install(folder / 'bin')}{os.pathsep}{os.environ['PATH']}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    environment = os.environ | values | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(["bash", str(script)], cwd=folder, env=environment, **options)


def asked_of_srun(folder):
    return json.loads((folder / "srun.json").read_text())
