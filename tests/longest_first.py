"""The order in which pytest-xdist's workers take the test files: the longest first.

So no worker waits long for the other at the end. A worker takes a whole file (`--dist loadfile`),
which makes what its tests share once.
"""

# CPU seconds of a case of a test, fixtures included, as measured one after another. Only the order
# of the files follows from them, so they need not be exact; tests that take little are not here.
SECONDS = {
    "test_benchmarks.py::test_every_piece_writes_its_figures_and_a_row": 104,
    "test_benchmarks.py::test_curves_cover_passages_batch_and_memory": 19,
    "test_benchmarks.py::test_index_prints_recall_speed_and_size": 11,
    "test_benchmarks.py::test_memory_does_not_grow_with_the_corpus": 38,
    "test_benchmarks.py::test_embedding_is_compared_with_sentence_transformers": 15,
    "test_checkpoints.py::test_a_damaged_file_is_damage_to_every_reader_or_to_none": 8,
    "test_checkpoints.py::test_a_full_disk_is_one_error_and_the_same_command_continues": 20,
    "test_compilation.py::test_answering_with_7b_and_13b_fits_as_the_readme_has_it": 36,
    "test_compilation.py::test_decoding_on_a_gpu_copies_no_weights": 15,
    "test_compilation.py::test_gpu_compiler_uses_cudnn_and_loops_are_counted": 15,
    "test_compilation.py::test_retrieval_over_four_chips_gathers_only_what_was_found": 15,
    "test_compilation.py::test_tpu_compiler_refuses_a_state_larger_than_a_chip": 10,
    "test_compilation.py::test_tpu_compiler_splits_a_small_model_over_four_chips": 10,
    "test_compilation.py::test_tpu_compiler_sums_gradients_between_two_slices": 15,
    "test_convert.py::test_the_model_is_never_in_memory": 35,
    "test_critic.py::test_several_devices_give_what_one_gives": 17,
    "test_flow.py::test_a_killed_evaluation_ends_with_the_same_report": 35,
    "test_flow.py::test_killed_again_and_again_it_ends_with_the_same_results": 65,
    "test_flow.py::test_the_commands_make_what_the_quickstart_makes": 40,
    "test_kill.py::test_a_killed_index_ends_with_the_files_of_one_that_was_not": 20,
    "test_kill.py::test_many_kills_change_nothing": 40,
    "test_label_command.py::test_kills_at_random_moments_lose_and_double_nothing": 13,
    "test_many_hosts.py::test_a_signal_to_one_process_stops_labelling_which_continues": 25,
    "test_many_hosts.py::test_answers_of_two_and_four_processes_are_those_of_one": 70,
    "test_needs.py::test_the_choices_are_compared_in_a_finished_quickstart": 45,
    "test_notebooks.py::test_documents_are_read_indexed_and_cited_in_the_tiny_world": 30,
    "test_notebooks.py::test_the_demo_runs_in_the_tiny_world": 38,
    "test_notebooks.py::test_the_published_models_path_runs_with_a_random_model_in_its_place": 30,
    "test_own_model.py::test_a_real_model_is_trained_exported_and_answers": 98,
    "test_own_model.py::test_the_document_on_a_model_of_ones_own_runs_as_written": 40,
    "test_published.py::test_a_published_folder_is_trained_and_exported": 8,
    "test_quantize.py::test_answering_compiles_for_a_tpu": 57,
    "test_quantize.py::test_answers_in_other_types": 23,
    "test_quantize.py::test_two_devices_answer_as_one": 29,
    "test_sharding.py::test_a_signal_to_one_process_stops_both_with_a_checkpoint": 20,
    "test_sharding.py::test_every_mesh_has_the_losses_of_one_device": 17,
    "test_sharding.py::test_two_processes_train_together": 40,
    "test_sweep.py::test_a_sweep_scores_each_setting_as_a_search_does_and_generates_twice": 23,
    "test_systems.py::test_systems_of_all_tasks_share_a_model_and_stand_in_one_table": 11,
    "test_training.py::test_adam_eps_keeps_unused_words_in_place": 9,
    "test_training.py::test_bf16_activations_learn_as_f32_does": 10,
    "test_training.py::test_fifty_steps_equal_those_of_torch": 14,
}
OTHERS = 0.3


def sort_files(items: list) -> None:
    """Sorts tests by the seconds of their files, in place; within a file their order stays."""
    seconds: dict[str, float] = {}
    for item in items:
        name = f"{item.path.name}::{item.originalname}"
        seconds[item.path.name] = seconds.get(item.path.name, 0.0) + SECONDS.get(name, OTHERS)
    items.sort(key=lambda item: -seconds[item.path.name])
