"""Graphs over ranks: topologies, schedules, generators and weight rules."""

from jfog.topology._exact_average import ExactAverage as ExactAverage
from jfog.topology._exact_average import base_k as base_k
from jfog.topology._exact_average import ceca as ceca
from jfog.topology._exact_average import hyper_hypercube as hyper_hypercube
from jfog.topology._exact_average import simple_base as simple_base
from jfog.topology._matchings import matcha as matcha
from jfog.topology._matchings import matchings as matchings
from jfog.topology._matchings import random_matchings as random_matchings
from jfog.topology._plot_rounds import plot_rounds as plot_rounds
from jfog.topology._schedule import Schedule as Schedule
from jfog.topology._schedule import lazy as lazy
from jfog.topology._static import chain as chain
from jfog.topology._static import erdos_renyi as erdos_renyi
from jfog.topology._static import exponential as exponential
from jfog.topology._static import from_networkx as from_networkx
from jfog.topology._static import fully_connected as fully_connected
from jfog.topology._static import hypercube as hypercube
from jfog.topology._static import mesh_grid_2d as mesh_grid_2d
from jfog.topology._static import random_regular as random_regular
from jfog.topology._static import ring as ring
from jfog.topology._static import star as star
from jfog.topology._static import symmetric_exponential as symmetric_exponential
from jfog.topology._static import torus_2d as torus_2d
from jfog.topology._time_varying import hierarchical as hierarchical
from jfog.topology._time_varying import (
  inner_outer_exponential as inner_outer_exponential,
)
from jfog.topology._time_varying import inner_outer_ring as inner_outer_ring
from jfog.topology._time_varying import one_peer as one_peer
from jfog.topology._time_varying import one_peer_equidyn as one_peer_equidyn
from jfog.topology._time_varying import (
  one_peer_exponential as one_peer_exponential,
)
from jfog.topology._topology import Topology as Topology
from jfog.topology._weights import max_degree as max_degree
from jfog.topology._weights import metropolis_hastings as metropolis_hastings
from jfog.topology._weights import uniform_in as uniform_in
from jfog.topology._weights import uniform_out as uniform_out
from jfog.topology._without import without as without

__all__ = [name for name in dir() if not name.startswith("_")]
