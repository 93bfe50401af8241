"""The sbatch file, run by bash against stand-ins for SLURM's programs."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples/slurm/pretrain.sbatch"

STAND_INS = {
    # Two tasks on each of two nodes; the status of the worst.
    "srun": """shift
worst=0
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"; status=$?
    (( status > worst )) && worst=$status
done
exit $worst""",
    "scontrol": """echo "scontrol $*" >> "$LOG"
[[ $1 == show ]] && printf 'node7\\nnode8\\n'""",
    "python": """echo "$RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"
exit $STATUS""",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def submitted(tmp_path, status, *words):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip
    paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "STATUS": str(status)}
    done = subprocess.run(["bash", SCRIPT, *words], env={**slurm, **paths}, capture_output=True, text=True)
    log = tmp_path / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def test_every_process_knows_its_place_and_gets_the_options(tmp_path):
    status, log, _ = submitted(tmp_path, 0, "r.toml", "/shared/my run", "--optim.lr", "1e-3")
    assert status == 0
    assert log == [
        "scontrol show hostnames node[7-8]",
        *(
            f"{rank}/4 local {rank % 2}/2 at node7:20041: -m evenstep pretrain r.toml --out /shared/my run --resume "
            "auto --optim.lr 1e-3"
            for rank in range(4)
        ),
    ]


@pytest.mark.parametrize("status, again", [(143, True), (75, True), (1, False), (2, False), (0, False)])
def test_it_is_requeued_when_that_helps(tmp_path, status, again):
    ended, log, _ = submitted(tmp_path, status, "r.toml", "/out")
    assert ended == status and ("scontrol requeue 41" in log) == again


def test_it_says_how_it_is_used(tmp_path):
    assert submitted(tmp_path, 0, "r.toml")[0] == 2 and "usage" in submitted(tmp_path, 0)[2]
