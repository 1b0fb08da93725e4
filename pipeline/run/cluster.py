"""A Ray cluster: how it is joined, and which machines it has and may get.

What Ray keeps private is asked in this file alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import grpc
import ray
from ray import exceptions as ray_errors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from depthvar.errors import InputError
from pipeline.run.address import AUTO, ClusterAddress, require_listener, who_answers
from pipeline.run.console import say
from pipeline.run.ledger import one_line
from pipeline.run.schedule import (
    Machine,
    all_gpu_memories,
    available_cores,
    available_memory,
    gpu_memory,
)

_PROBE_S = 5.0
_ASK_S = 30.0  # a node starts a process to answer, and may have to install what it runs
TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
)
_MEMORY_RESOURCES = ("memory", "object_store_memory")  # a node's memory as Ray shares it out
_OBJECT_STORE_BYTES = 128 * 2**20  # images never enter the object store


@contextlib.contextmanager
def ray_session(connect: dict[str, Any]) -> Iterator[None]:
    """Start Ray here or join a cluster, quietly; whoever is connected already stays connected."""
    if ray.is_initialized():
        yield
        return
    if connect["address"] == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        connect = {
            **connect,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        with _hangups_held_back():
            ray.init(**connect, log_to_driver=False, logging_level=logging.ERROR)
    except SystemExit:  # raised by Ray's own handler of SIGTERM
        say("stopped")
        raise SystemExit(128 + signal.SIGTERM) from None
    except (ConnectionError, ray_errors.RayError, RuntimeError, ValueError) as error:
        reason = one_line(error if error.__cause__ is None else error.__cause__)
        raise InputError(
            f"cannot join or start Ray at {connect['address']}: {reason}: check --address and that"
            " the cluster runs"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _hangups_held_back() -> Iterator[None]:
    """Start what is started meanwhile deaf to SIGHUP, which a lost terminal sends to all of a job.

    Processes inherit what is held back; Ray does the same with Ctrl-C. The driver hears of it then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def found_cluster(address: ClusterAddress) -> ClusterAddress:
    """The cluster that answers at an address, found out within seconds; Ray would try for minutes.

    Raises `InputError` where it is none, wants another token, has another version of Ray, or where
    this machine is none of its nodes.
    """
    if address.text == AUTO:
        address = _cluster_here(address)
    require_listener(address)
    try:
        version, nodes = _ask_gcs(address)
        nodes_here = _private("services").find_node_ids()
    except (ImportError, AttributeError):  # it has moved: Ray finds out by itself
        return address
    except ray_errors.AuthenticationError as error:
        reason = str(error).partition(". ")[0]
        raise InputError(
            f"{address}, and there is no token to show: {reason}: {TOKEN_ADVICE}"
        ) from None
    except grpc.RpcError as error:
        raise InputError(f"{address}, {_unfit(address, error.code())}") from None
    if version and version != ray.__version__:
        raise InputError(
            f"{address}, a cluster of Ray {version}, and this process has Ray {ray.__version__}:"
            " install the cluster's version"
        )
    if nodes.isdisjoint(nodes_here):
        raise InputError(
            f"{address}, a cluster that this machine is no node of: run the command on one of its"
            f" nodes, or hand it in with `depthvar submit --address http://{address.host}:8265`"
        )
    return address


def _ask_gcs(address: ClusterAddress) -> tuple[str, frozenset[str]]:
    """Ray's version there and the ids of the nodes that are alive."""
    generated = "ray.core.generated"
    messages = importlib.import_module(f"{generated}.gcs_service_pb2")
    services = importlib.import_module(f"{generated}.gcs_service_pb2_grpc")
    states = importlib.import_module(f"{generated}.gcs_pb2").GcsNodeInfo
    with _private("gcs_utils").create_gcs_channel(address.text) as channel:
        gcs = services.NodeInfoGcsServiceStub(channel)
        alive = gcs.CheckAlive(messages.CheckAliveRequest(), timeout=_PROBE_S)
        nodes = gcs.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=_PROBE_S)
    ids = (n.node_id.hex() for n in nodes.node_info_list if n.state == states.ALIVE)
    return alive.ray_version, frozenset(ids)


def _cluster_here(address: ClusterAddress) -> ClusterAddress:
    """The cluster that `auto` means: one that runs on this machine, with the token it has here."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    services = _private("services")
    services.find_gcs_addresses.cache_clear()
    try:
        found = services.canonicalize_bootstrap_address(AUTO)
    except ConnectionError:
        raise InputError(
            f"{address}, and no Ray cluster runs on this machine: give --address HOST:PORT, start"
            " one with `ray start --head`, or leave it out for Ray on this machine"
        ) from None
    tokens = _private("authentication.authentication_token_setup")
    tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return ClusterAddress(f"{address.source} auto", found)


def _private(module: str) -> ModuleType:
    """A module of Ray that promises nothing."""
    return importlib.import_module(f"ray._private.{module}")


def _unfit(address: ClusterAddress, code: grpc.StatusCode) -> str:
    """Why a server is not a cluster that can be joined, and what to do."""
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"a cluster that refuses this process without its token: {TOKEN_ADVICE}"
    who = "a gRPC server answers, as Ray Client's is on 10001,"
    if code != grpc.StatusCode.UNIMPLEMENTED:
        who = who_answers(address)
    return (
        f"where {who} and no Ray cluster: give its GCS, on port 6379 unless it was started with"
        " another"
    )


def this_machine(*, with_gpus: bool) -> Machine:
    """What this machine has for workers, without asking Ray."""
    num_gpus = local_gpus() if with_gpus else 0
    return Machine(
        available_cores(), num_gpus, available_memory(), gpu_memory() if num_gpus else None
    )


def local_gpus() -> int:
    """GPUs that Ray would find here, without starting it; 0 if Ray's detection has moved."""
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        manager: Any = get_accelerator_manager_for_resource("GPU")
        visible = manager.get_current_process_visible_accelerator_ids()
        found = int(manager.get_current_node_num_accelerators())
    except Exception:
        return 0
    return found if visible is None else min(found, len(visible))


def cluster_machines(*, asks_gpus: bool = False) -> list[Machine]:
    """The cluster's nodes that are alive and not draining.

    With `asks_gpus` those with GPUs are asked how much memory these have, which takes seconds.
    """
    draining = draining_nodes()
    nodes = [n for n in _nodes() if n["Alive"] and n["NodeID"] not in draining]
    told: Mapping[str, int] = {}
    if asks_gpus:
        told = _gpu_memory_of([n["NodeID"] for n in nodes if n["Resources"].get("GPU")])
    return [
        Machine(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            memory=int(sum(node["Resources"].get(name, 0) for name in _MEMORY_RESOURCES)) or None,
            gpu_memory=told.get(node["NodeID"]),
        )
        for node in nodes
    ]


def _gpu_memory_of(node_ids: Sequence[str]) -> dict[str, int]:
    """Bytes of the smallest GPU of each node that tells them in time, by its id."""
    if not node_ids:
        return {}
    task: Any = ray.remote(num_cpus=0, max_calls=1)(all_gpu_memories)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(i, soft=False)).remote(): i
        for i in node_ids
    }
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_S)
    for answer in late:
        ray.cancel(answer)
    told = {}
    for answer in ready:
        with contextlib.suppress(ray_errors.RayError):
            if memories := ray.get(answer):
                told[asked[answer]] = min(memories)
    return told


def is_placed(actor: Any) -> bool:
    """Whether an actor has a process, where it may still load its model. Private to Ray."""
    try:
        return bool(ray._private.state.actors(actor._actor_id.hex())["Pid"])
    except Exception:
        return True


def alive_nodes() -> frozenset[str]:
    """The ids of the nodes that the cluster takes for alive."""
    return frozenset(node["NodeID"] for node in _nodes() if node["Alive"])


def _nodes() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]


def draining_nodes() -> frozenset[str]:
    """Nodes about to go away. Private to Ray, used by its own libraries: absent means none."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception:
        return frozenset()


def known_node_types() -> list[Machine] | None:
    """Nodes that an autoscaler may start: none without one, None if it does not tell which.

    Private to Ray: where that has moved nobody knows.
    """
    try:
        config = ray._private.state.state.get_cluster_config()
        groups = [] if config is None else config.node_group_configs
        if groups:
            kinds = [group.resources for group in groups if group.max_count]
            return [Machine(kind.get("CPU", 0), kind.get("GPU", 0)) for kind in kinds]
        return None if _has_autoscaler() else []
    except Exception:
        return None


def _has_autoscaler() -> bool:
    """Whether something starts nodes when they are asked for: either version of the autoscaler."""
    from ray.experimental.internal_kv import _internal_kv_get

    status = importlib.import_module("ray.core.generated.autoscaler_pb2").GetClusterStatusReply()
    gcs = _private("worker").global_worker.gcs_client
    status.ParseFromString(gcs.get_cluster_status(timeout_s=_PROBE_S))
    if status.autoscaling_state.autoscaler_state_version:
        return True
    return starts_nodes(_internal_kv_get("__autoscaling_status"))


def starts_nodes(monitor_status: bytes | None) -> bool:
    """Whether the head's monitor reports node types; else every node is a type of its own."""
    if monitor_status is None:
        return False
    report = json.loads(monitor_status).get("autoscaler_report") or {}
    node_types = {*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {})}
    return not all(re.fullmatch(r"node_[0-9a-f]{32,}", name) for name in node_types)


def autoscaler_limit() -> Machine:
    """The most the cluster may grow to; nothing if it does not grow. Private to Ray."""
    try:
        most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    except Exception:
        most = {}
    return Machine(most.get("CPU", 0) or 0, most.get("GPU", 0) or 0)
