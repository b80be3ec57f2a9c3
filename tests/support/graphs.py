"""Every generator of `jfog.topology` as a function of the number of ranks."""

from jfog import topology as jt

SIZES = [*range(1, 18), 23, 30, 31, 32, 33, 36, 47, 64]
EVERY_SIZE = {
  "exponential": jt.exponential,
  "exponential_3": lambda n: jt.exponential(n, base=3),
  "symmetric_exponential": jt.symmetric_exponential,
  "symmetric_exponential_2": lambda n: jt.symmetric_exponential(n, base=2),
  "ring": jt.ring,
  "ring_left": lambda n: jt.ring(n, "left"),
  "ring_right": lambda n: jt.ring(n, "right"),
  "chain": jt.chain,
  "mesh_grid_2d": jt.mesh_grid_2d,
  "torus_2d": jt.torus_2d,
  "star": jt.star,
  "star_last": lambda n: jt.star(n, center=n - 1),
  "fully_connected": jt.fully_connected,
  "erdos_renyi": lambda n: jt.erdos_renyi(n, 0.5, seed=n),
}
DIRECTED = {"exponential", "exponential_3", "ring_left", "ring_right"}
REGULAR = {
  "exponential",
  "exponential_3",
  "symmetric_exponential",
  "symmetric_exponential_2",
  "ring",
  "ring_left",
  "ring_right",
  "torus_2d",
  "fully_connected",
}
