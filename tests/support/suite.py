"""The quick suite: the forms of tests that `pytest` runs without `--full`.

Four rules keep the quick suite short:

1. An MPI test runs on one number of ranks (`SIZES`, in order of preference). Tests
   that need more than four ranks belong to the full suite.
2. The files in `FULL_FILES` start whole programs or jobs of their own. They belong
   to the full suite, except for the tests in `QUICK_TESTS`.
3. The tests in `FULL_TESTS` take long to compile or to run; some of them only in
   the forms named there.
4. `@pytest.mark.full` marks single tests and parameters.

The full suite in turn leaves to `--soak` what `@pytest.mark.soak` marks, and the
forms in `SOAK_TESTS`: repetitions of what another form covers.

A test that is named on the command line by its full id (`file.py::test`) always
runs.
"""

import importlib.util
import re

import pytest

SIZES = ("3", "4x2", "2", "4", "3x1", "1", "3x3")

FULL_FILES = {
  "test_asynchrony.py": "windows under load, on several networks",
  "test_checkpoints.py": "trainings that are killed and go on",
  "test_emulation.py": "the emulation of NCCL itself",
  "test_examples.py": "every example, in simulation and on MPI",
  "test_failures.py": "jobs that fail",
  "test_fault_schedules.py": "trainings whose ranks are killed",
  "test_fault_tolerance.py": "jobs that go on when a rank fails",
  "test_share_state.py": "jobs that ranks join",
  "test_hangs.py": "jobs that go on when a rank is stuck",
  "test_fault_windows.py": "windows of which a rank is killed",
  "test_gpu_benchmark.py": "the models of the GPU benchmark",
  "test_gpu_check.py": "the driver of the GPU check",
  "test_mailboxes.py": "every length, graph and number of machines",
  "test_malformed_messages.py": "jobs whose messages are damaged",
  "test_mpi4jax.py": "mpi4jax in the same program",
  "test_notebooks.py": "notebooks, some with engines on MPI",
  "test_nccl.py": "handlers of NCCL on the emulation",
  "test_shared_memory_channel.py": "every length, graph and number of hosts",
}

QUICK_TESTS = {
  "test_a_graph_without_ranks",
  "test_bad_hang_timeouts_are_named",
  "test_bad_leaves_and_sizes_name_the_values",
  "test_leaves_travel_bit_for_bit",
  "test_spares_take_the_lowest_free_places",
  "test_the_source_is_a_neighbor_that_has_the_state",
  "test_an_exception_on_one_rank",
  "test_bad_on_missing_names_the_values",
  "test_masks_of_another_shape_or_dtype",
  "test_other_operations_refuse_missing_ranks",
  "test_pairs_go_on_without_ranks_and_messages",
  "test_simulation_goes_on_without_ranks_and_messages",
  "test_weights_at_run_time_go_to_the_own_value",
  "test_leaves_across_chunks",
  "test_lengths_and_graphs_in_turn",
  "test_more_in_flight_than_slots",
  "test_ranks_may_weight_differently",
}

# Parts of the names of the forms, places above all; none means all forms.
FULL_TESTS: dict[str, tuple[str, ...]] = {
  # Optimizers: every combination compiles a program of its own in each place.
  "test_chained_masked_and_in_several_steps": ("simulate",),
  "test_half_parameters_have_float32_states": (),
  "test_a_restored_state_goes_on_bit_for_bit": (),
  "test_exact_methods_reach_the_minimizer_where_averaging_stalls": (),
  "test_disagreement_grows_by_the_largest_root": (),
  "test_identities": (),
  "test_no_drift_in_float32": (),
  "test_iterates_are_those_of_the_dense_recursion": (
    *("mpi", "mesh", "single", "simulate-8-changing"),
  ),
  "test_gradient_allreduce_is_the_dense_recursion": ("mpi", "mesh", "single"),
  "test_power_gossip_is_the_dense_recursion": ("mesh", "simulate-8", "mpi"),
  "test_relay_sum_is_the_dense_recursion_and_exact": ("simulate-8", "mpi"),
  "test_constant_values_are_averaged_after_diameter_steps": (),
  "test_push_sum_at_random_paces_reaches_the_average": ("mpi",),
  "test_training_at_random_paces_comes_close": ("mpi",),
  "test_without_gradients_the_mean_stays": (),
  "test_in_program_order_it_is_adapt_with_combine": (
    *("adamw-directed ring-3-window_get", "mesh-4-momentum", "mesh-4-adamw"),
    *("single-momentum", "single-adamw"),
  ),
  "test_in_program_order_it_is_push_sum": (
    *("mesh-4-momentum", "mesh-4-adamw", "sgd-exponential"),
    *("single-momentum", "single-adamw", "simulate-5-adamw"),
  ),
  "test_push_sum_with_delays": ("uneven",),
  "test_an_axis_of_the_users_own": (
    *("shard_map-2", "shard_map-1-window_get", "shard_map-1-window_push_sum"),
    *("vmap-2-window_put", "vmap-2-adapt_then_combine"),
    *("shard_map-1-adapt_with_combine", "shard_map-1-gradient_allreduce"),
  ),
  "test_state_is_a_pytree_that_stacks_over_ranks": ("None-window",),
  "test_wrapped_by_other_transformations": ("mesh-4-window",),
  # Examples of optimizers, whose recursions are quick tests.
  "test_examples_run": (
    *("relay_sum", "power_gossip", "deep_squeeze", "_window_averaging."),
    *("_bias_corrected.", "_periodic.", "_quantize.", "_low_rank."),
    *("attacks._attacks.", "lab._sweep."),
  ),
  # Operations
  "test_value_is_the_dense_product": (
    *("simulate-6x2-base", "simulate-6x2-move", "simulate-6x2-star"),
    *(
      "simulate-6x2-one_peer_star",
      "simulate-6x2-uniform",
      "simulate-6x2-grid",
    ),
    "simulate-6x2-complete",
  ),
  "test_float64_and_16_bits": ("simulate",),
  "test_allreduce_dtypes": ("mesh-4-int", "mesh-4-uint"),
  "test_every_size_in_simulation": (),
  "test_exact_diffusion_does_not_drift_in_float32": ("mesh", "mpi"),
  "test_the_exchange_goes_on_while_nobody_waits": (),
  # Attackers and averages that withstand them
  "test_averages_of_what_is_sent": ("alie", "inner_product", "own"),
  "test_scales_are_traced_and_differentiated": (),
  "test_sweeps": (),
  "test_other_dtypes": (),
  "test_noise_repeats_and_differs": (),
  "test_values_are_those_of_a_loop_over_ranks": (
    *("simulate-5", "mesh", "complete", "mpi-3-changing"),
    "simulate-6-changing",
  ),
  "test_gathers_of_what_is_sent": ("alie", "inner_product", "own"),
  "test_missing_ranks_and_messages": ("alie", "sign_flip"),
  "test_a_known_step_takes_its_round": (),
  "test_complex_leaves_are_two_real_ones": (),
  "test_a_value_that_is_not_finite_is_left_out": ("inf",),
  "test_16_bits_are_summed_in_float32": (),
  "test_many_neighbors": (),
  "test_an_infinite_radius_is_plain_averaging": (),
  "test_optimizers_take_them": (),
  "test_robust_averages_stay_near_where_the_plain_one_diverges": (),
  "test_value_and_gradient_are_those_of_the_product": ("[1",),
  # Windows: the mesh runs the same program as the simulation.
  "test_any_interleaving_is_the_models": ("simulate",),
  "test_push_sum_finds_the_average_and_loses_nothing": ("simulate",),
  # Compressors, whose recursions are quick tests
  "test_power_gossip_in_full_rank_is_plain_gossip_in_even_steps": (),
  "test_codes_of_all_widths_fill_their_bytes": (),
  # Pages that take long; the others are quick.
  "test_python_blocks_run": (
    *("frameworks", "machines", "own_algorithm", "watching", "coming_from"),
    *("training_loops", "docs/lab"),
  ),
  "test_two_groups_of_ranks_of_mpi4py": (),
  "test_the_traced_program": (),
  "test_the_report_of_the_first_failure": (),
  "test_counters_and_the_warning_of_a_wait": (),
  # Jobs of their own
  "test_random_programs": (),
  "test_ranks_that_disagree": (),
  "test_late_and_suspended_ranks": (),
  "test_a_training_of_one_rank": (),
  "test_a_file_for_the_output_of_each_rank": ("--no-tag-output",),
  "test_chunks_of_operations_with_one_tag_are_not_swapped": (),
  "test_a_peer_that_has_passed_by_is_a_mismatch": (),
  "test_an_operation_without_memory_is_an_error_on_all_ranks": (
    *("neighbor", "broadcast", "allgather"),
  ),
  "test_doctor_does_well_without_gpus": (),
  "test_a_world_without_a_launcher_leaves_no_shared_memory": (),
  "test_a_world_that_is_not_the_job_says_so": (),
  "test_handlers_are_registered_after_the_backends_have_started": (),
  "test_two_processes_run_each_test_once_and_report_it": (),
  "test_mpirun_that_does_not_end_is_ended": (),
  "test_killed_rank_ends_the_job": (),
  "test_a_rank_that_leaves_mpi_unfinished_ends_the_job": (),
  "test_ranks_may_end_at_different_times": (),
  "test_a_profile_is_joined_on_the_clock_of_the_timeline": (),
  "test_the_timeline_of_ranks_that_die": (),
}

# Tests of the full suite and parts of the names of their forms, as above.
SOAK_TESTS: dict[str, tuple[str, ...]] = {
  # One kind of hang of several.
  "test_averages_go_on_without_a_stuck_rank": ("spin",),
  "test_averages_go_on_without_a_rank_of_the_second_host": ("sleep", "stop"),
  "test_a_stuck_rank_is_recovered_from": ("options0",),
  "test_a_world_whose_ranks_are_replaced_has_the_same_programs": ("2",),
  # Their forms on MPI compare with the simulation.
  "test_average_consensus": (),
  "test_digits_on_virtual_ranks": (),
  "test_digits_are_equal_on_mpi_and_in_simulation": (),
  "test_exact_methods_find_the_minimizer": (),
  "test_flax_network_resumes": ("simulate",),
  "test_low_rank_adapters": ("simulate",),
  "test_states_of_the_old_graph_are_made_anew": ("relay",),
  # One network, fault or order of several.
  "test_random_programs": ("2", "3", "4", "5"),
  "test_faults": ("stop-in_init",),
  "test_windows_at_work": ("TCP",),
  "test_operations_after_the_end_of_a_window": ("shared memory",),
  "test_ranks_that_end_their_loops_at_different_times": ("shared memory",),
  "test_a_rank_that_is_suspended_is_late_and_not_wrong": (
    *("rank-shared memory", "ranks-messages"),
  ),
  "test_a_bad_job_costs_only_its_own_result": (
    *("crashes", "is killed", "leaves a process"),
  ),
  "test_killed_rank_ends_the_job": ("sleep", "pass"),
  "test_errors_have_one_class": ("eager-100000", "jit-1"),
  "test_another_jax_keeps_its_own_order": ("signature", "result"),
  "test_python_may_end_right_after_a_dispatch": ("[]",),
  "test_equal_constants_in_jitted_functions_without_arguments": ("strict",),
  "test_either_may_come_first": ("mpi4jax first", "mpi4py"),
  "test_an_exception_on_one_rank_ends_the_job": ("mpi4jax",),
  "test_an_mpi4jax_that_does_not_import_is_as_none": ("RuntimeError",),
  "test_an_operation_without_memory_is_an_error_on_all_ranks": (
    *("broadcast", "allgather"),
  ),
  "test_a_run_equals_its_simulation": ("[]",),
  "test_windows_go_on_without_a_rank": ("shared", "-40000"),
  "test_each_rank_learns_by_windows_alone": ("messages",),
  "test_a_rank_that_fails_in_win_create_is_an_error": (),
  "test_peers_go_on_without_a_rank": ("shared", "-40000"),
  "test_messages_to_lost_ranks_take_nothing_from_the_others": ("300",),
  "test_more_chunks_in_flight": ("64",),
  "test_random_faults": ("4",),
  # Jobs of many seconds, of whose parts there are tests.
  "test_the_limit_adapts_to_pauses_of_the_run": (),
  "test_pretended_machines_and_their_parts": (),
  "test_a_link_that_comes_back_costs_no_rank": (),
  "test_a_training_survives": (),
  "test_ranked_tests_pass_on_the_emulation": (),
  "test_a_job_measures_and_checks_every_operation": ("4",),
  "test_jobs_of_its_own_and_ranks_of_another": (),
  "test_engines_that_wait_or_die_are_errors_and_start_again": (),
  "test_suites_pass_in_strict_order": (),
  "test_damaged_messages_are_errors": ("2-messages",),
  "test_a_join_while_another_rank_dies": ("later0", "later2"),
  "test_averages_go_on_until_a_spare_is_wanted": (),
}


def require(*modules: str) -> None:
  """Skips a test without a module that only the extra `test-all` installs."""
  for module in modules:
    parent = module.partition(".")[0]
    if not (
      importlib.util.find_spec(parent) and importlib.util.find_spec(module)
    ):
      pytest.skip(f"{module} is missing: pip install '.[test-all]'")


def place_of(item) -> str:
  """The name of the place of a test's form, "" if the test has none."""
  return str(
    getattr(item, "callspec", None) and item.callspec.params.get("place", "")
  )


def is_slow(item) -> bool:
  """Whether rules 2 to 4 leave a form of a test to the full suite."""
  if item.get_closest_marker("full") or needs_soak(item):
    return True
  if item.path.name in FULL_FILES and item.originalname not in QUICK_TESTS:
    return True
  return _is_in(FULL_TESTS, item)


def needs_soak(item) -> bool:
  """Whether a form of a test runs with `--soak` only."""
  return bool(item.get_closest_marker("soak")) or _is_in(SOAK_TESTS, item)


def _is_in(tests: dict[str, tuple[str, ...]], item) -> bool:
  """Whether a table has the form of a test."""
  parts = tests.get(item.originalname)
  form = item.nodeid.partition(item.originalname)[2]
  return parts is not None and (
    not parts or any(part in form for part in parts)
  )


def _size(item) -> str:
  """The number of ranks of an MPI form as its name shows it."""
  found = re.match(r"mpi-(\d+(?:x\d+)?)$", place_of(item))
  return found[1] if found else ""


def quick(items, named=()) -> tuple[list, list]:
  """Splits tests into those of the quick suite and the others.

  Args:
    items: the collected tests.
    named: ids from the command line, whose tests run in any case.

  Returns:
    The quick tests and the rest, both in the given order.
  """
  chosen: dict[str, str] = {}  # test without its number of ranks -> size
  for item in items:
    size = _size(item)
    if size in SIZES and not is_slow(item):
      key = item.nodeid.replace(f"mpi-{size}", "mpi")
      best = min(chosen.get(key, size), size, key=SIZES.index)
      chosen[key] = best
  runs, rest = [], []
  for item in items:
    size = _size(item)
    key = item.nodeid.replace(f"mpi-{size}", "mpi")
    one_size = not size or chosen.get(key) == size
    is_named = any(item.nodeid.startswith(name) for name in named)
    quick = is_named or (one_size and not is_slow(item))
    (runs if quick else rest).append(item)
  return runs, rest
