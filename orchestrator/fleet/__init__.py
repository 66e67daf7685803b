"""Many runs, one cluster: who gets how many devices. Pure: numbers in, allocations out."""

from orchestrator.fleet.fair import FairPolicy
from orchestrator.fleet.fifo import FifoPolicy
from orchestrator.fleet.goodput import GoodputPolicy
from orchestrator.fleet.policy import POLICIES, make_policy
from orchestrator.fleet.view import Allocation, Allocations, JobView, Node, Nodes, Policy

__all__ = [
    "POLICIES",
    "Allocation",
    "Allocations",
    "FairPolicy",
    "FifoPolicy",
    "GoodputPolicy",
    "JobView",
    "Node",
    "Nodes",
    "Policy",
    "make_policy",
]
