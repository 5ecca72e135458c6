"""The flags of launch/tpu.py."""

from __future__ import annotations

from selfrag_jax.commands.command import Flag

NAME = Flag("name", "what `create` called it", required=True)
DRY_RUN = Flag("dry_run", "print the commands of gcloud and do nothing", False, type=bool)
POLL = Flag("poll", "seconds between two looks", 60.0, type=float)
HANG = Flag("hang_minutes", "no progress for so long is a hang", 30.0, type=float)
DELETE_ON_EXIT = Flag(
    "delete_on_exit",
    "delete the TPU when this command fails or is interrupted (Ctrl-C), so that it frees its quota",
    False,
    type=bool,
)
CREATE = (
    Flag("name", "of the queued resource and its TPU VMs", required=True),
    Flag("type", "v6e-16, v5litepod-16, v5p-32, v4-32, or v6e:4x4", required=True),
    Flag("zone", "a zone that has this type", required=True),
    Flag("project", "of Google Cloud; gcloud's default if not given"),
    Flag("slices", "several slices for one job (multislice)", 1, type=int),
    Flag("spot", "spot VMs: a fraction of the price, and pre-empted at any time", False, type=bool),
    Flag("reserved", "from your reservation", False, type=bool),
    Flag("flex_start", "flex-start (gcloud alpha); with --max_run_duration", False, type=bool),
    Flag("max_run_duration", "delete the VMs after so long, such as 4h"),
    Flag("valid_until", "leave the queue if there is no capacity for so long, such as 6h"),
    Flag("runtime", "software of the VMs; the type's own if not given"),
    Flag("startup", "a script that every VM runs as root when it boots"),
    Flag("service_account", "of the VMs, such as one that may read your bucket"),
    Flag("network", "of the VMs"),
    Flag("internal_ips", "no public addresses", False, type=bool),
    Flag("unlisted_zone", "pass on a zone that our table does not have", False, type=bool),
    Flag("wait", "wait until it is ready", True, type=bool),
    POLL,
    DELETE_ON_EXIT,
    DRY_RUN,
)
RUN = (
    NAME,
    Flag("dirty", "pack changes that are not committed, too", False, type=bool),
    Flag("env", "variables of this shell to pass on, such as HF_TOKEN", type=tuple),
    DRY_RUN,
)
LOGS = (
    NAME,
    Flag("follow", "go on with what comes", False, type=bool),
    Flag("lines", "of each log", 20, type=int),
    Flag(
        "delete_on_exit", "delete the TPU on Ctrl-C, so that it frees its quota", False, type=bool
    ),
    DRY_RUN,
)
STATUS = (Flag("name", "one TPU; all that are recorded if not given"), HANG, DRY_RUN)
RESUME = (
    NAME,
    Flag("watch", "stay, and do it whenever it is needed", False, type=bool),
    Flag("max_restarts", "of --watch", 20, type=int),
    Flag("recreate", "delete and make it again in any case", False, type=bool),
    HANG,
    POLL,
    Flag(
        "delete_on_exit",
        "delete the TPU when this command fails or is interrupted (Ctrl-C), and with --watch also "
        "when the stage has finished",
        False,
        type=bool,
    ),
    DRY_RUN,
)
DELETE = (NAME, Flag("wait", "until they are gone", False, type=bool), DRY_RUN)
