"""Scripts and manifests that start runs elsewhere: what of them can be known here."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from sarjax.recipes import RECIPES

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
MANIFESTS = list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


def checked(manifest):
    """The manifest as JobSet's published schema reads it: fields that it does not know are lost."""
    return JobsetV1alpha2JobSet.from_dict(manifest).to_dict()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m["metadata"]["name"])
def test_manifests_fit_the_schema(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert checked(manifest) == manifest
    for job in manifest["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        assert spec["completionMode"] == "Indexed", "else jax does not know which process it is"
        assert spec["completions"] == spec["parallelism"]
        (container,) = spec["template"]["spec"]["containers"]
        assert container["command"][:2] == ["sarjax", "train"]
        assert container["command"][2] in RECIPES


def test_the_schema_refuses():
    (job,) = MANIFESTS[0]["spec"]["replicatedJobs"]
    misspelt = MANIFESTS[0] | {"spec": {"replicatedJobs": [job | {"replicaz": 1}]}}
    assert checked(misspelt) != misspelt
    with pytest.raises(ValueError, match="replicas"):
        checked(MANIFESTS[0] | {"spec": {"replicatedJobs": [job | {"replicas": "two"}]}})


@pytest.mark.parametrize("script", ["launch/slurm.sbatch", "launch/tpu_vm.sh", "tests/slurm/run.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", LAUNCH.parent / script], check=True)


def dry(*args, **variables):
    """The commands that tpu_vm.sh would run; a PATH without gcloud shows that it runs none."""
    env = {"PATH": "/usr/bin:/bin", "ZONE": "us-z", "TPU": "slice", **variables}
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "--dry-run", *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [
        subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.splitlines()
        for line in done.stdout.splitlines()
    ]


def test_a_tpu_slice_dry_run():
    (command,) = dry("train", "cheng_lanet", "--data.name", "a b", PROJECT="p", WORKDIR="/mnt/run", DATA="/tmp/d")
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert command[6:-1] == ["--zone=us-z", "--project=p", "--worker=all"]
    remote = (
        "venv/bin/sarjax train cheng_lanet --workdir /mnt/run --data-dir /tmp/d --distributed on --data.name a\\ b "
    )
    assert command[-1] == f"--command={remote}"
    assert [command[:6][-2] for command in dry("install")[1:]] == ["scp", "ssh"]
    (command,) = dry("data", RECORDS="gs://bucket/records", DATA="/tmp/d")
    assert command[-1].endswith("gcloud storage rsync --recursive gs://bucket/records /tmp/d")
    (command,) = dry("stop")
    assert re.search(r"pkill -TERM", command[-1])
