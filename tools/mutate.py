"""Mutation tests: break the code in one place at a time, and run the tests that should fail.

    python tools/mutate.py              every mutation: a line for each, exit code 1 if one survives
    python tools/mutate.py --only mona  those whose file and description match a regular expression

Each mutation replaces one text, which must occur exactly once in its file, and names its tests by function; the file of a test
is looked up. A process imports the libraries once and forks a child for every mutation, in a copy of the project, so that a
mutation costs little more than its tests. The tests must also pass on the code as it is.
"""

import gc
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for the tests of one mutation

PARE, RELEASED = "test_pare_takes_the_steps_of_the_paper", "test_pare_as_released_draws_noise_and_enters_its_second_phase"
PARE_START = "test_pare_starts_as_told"
ORCA, ORCA_RELEASED = (f"test_orca_aligns_the_embedder_then_refines_from_it[{released}]" for released in (False, True))
ORCA_DRAWS = "test_orca_draws_classes_and_samples_as_told"
MONA, DIFFERENCE = (
    "test_mona_looks_one_step_ahead_then_refines_from_there", "test_the_finite_difference_agrees_with_the_exact_gradient",
)  # fmt: skip
MONA_LAYOUT = "test_stage_1_with_lambda_0_is_a_plain_loop_over_the_embedder[cifar100]"
RECRAFT, RECRAFT_RELEASED = "test_stage_1_by_a_plain_loop", "test_as_released_steps_through_groups_of_one_class"
RECRAFT_SAME, RECRAFT_KEPT = (
    "test_encoder_and_source_predictor_are_bit_identical_after_stage_1", "test_recraft_trains_the_embedder_only_and_keeps_it",
)  # fmt: skip
RECRAFT_NAIVE = "test_a_method_without_its_first_stage_is_naive_fine_tuning[recraft]"
CONTRAST_FORMULA, CONTRAST_FIELDS = (
    "test_the_loss_is_its_formula", "test_fields_are_weighted_by_the_correlation_of_their_targets",
)  # fmt: skip
CONTRAST_1, CONTRAST_2, CONTRAST_KEPT = (
    "test_stage_1_takes_the_steps_of_the_sheet", "test_stage_2_takes_the_steps_of_pare_with_attention_scores",
    "test_the_embedder_of_stage_1_is_kept_and_may_stay",
)  # fmt: skip
SCORES, KEPT_MODEL = "test_attention_scores_are_those_of_the_librarys_eager_path", "test_scores_leave_the_model_as_it_was"
VIT = "test_embedder_and_encoder_are_timms_model"
VIT_SCORES = "test_attention_scores_of_a_vit_are_those_of_timms_unfused_path"
VIT_PLAIN, VIT_PARTS = "test_vits_that_are_not_plain_are_refused", "test_baselines_train_the_parts_of_a_vit_that_they_say"
BASELINES = "test_each_baseline_learns_and_trains_what_it_says"
LORA, MERGED = (
    "test_lora_starts_at_the_pretrained_model_and_adds_updates_of_rank_r", "test_lora_evaluates_and_saves_the_merged_weights",
)  # fmt: skip
LSG, LSG_RELEASED, LSG_TEXT = (f"test_lsg_guides_by_the_graph_or_by_vectors[{kind}]" for kind in ("graph", "released", "text"))
PROCESSES = "test_first_stages_their_gradients_and_evaluation_are_those_of_one_process"
LSG_GRAPH = "test_the_graph_is_symmetric_with_cliques_self_loops_and_so_many_edges_between_classes"
LSG_STAGE1, LSG_NODES = "test_the_gcn_learns_as_in_a_plain_loop", "test_nodes_and_edges_are_computed_once"
LSG_NAIVE = "test_a_method_without_its_first_stage_is_naive_fine_tuning[lsg]"
LSG_CLOSED = "test_the_closed_form_is_the_dense_graph_and_samples_of_a_class_are_one"
LSG_TOKENS = "test_the_tokens_of_a_name_are_found_wherever_it_stands"
LSG_MEAN = "test_a_prompt_is_the_mean_over_its_names_tokens"
LSG_DISTANCE = "test_regularisation_is_a_distance_and_its_target_is_constant"
NAIVE, PARTS = "test_naive_fine_tuning_takes_plain_steps", "test_baselines_train_the_parts_they_say"
SCRATCH, BEST = (
    "test_scratch_keeps_nothing_of_the_pretrained_weights",
    "test_the_test_error_is_that_of_the_epoch_that_was_best_on_validation",
)
EVALUATION = "test_evaluation_is_repeatable_and_training_is_not"
RESUME = "test_a_stopped_run_resumes_with_the_weights_of_an_uninterrupted_one"
ANSWERS = "test_answers_for_the_official_test_set_have_the_error_of_the_run"
LOADED = "test_the_model_is_that_of_the_best_epoch_in_evaluation_mode"
TRACKED, TRACK_RESUMED = (
    "test_tracked_numbers_are_those_of_the_run_which_stays_the_same", "test_a_resumed_run_has_no_step_twice",
)  # fmt: skip

CLIP = "nn.utils.clip_grad_norm_(net.parameters(), args.clip)"
INIT = ("--init is ignored", "source, args.init, task.tokens)", 'source, "copy", task.tokens)')
DROPOUT = ("--dropout is ignored", "common.set_dropout(source.encoder, args.dropout)", "source.encoder")
TRAIN = ("no net.train()", "        net.train()\n", "        net.eval()\n")
COPIED = "__import__('copy').deepcopy"

# file: (what is broken, text, text instead, tests that notice)
MUTATIONS = {
    "pare.py": [
        ("lambda squared", "(1 - lam) * task.loss(out_m, y) + lam *", "(1 - lam**2) * task.loss(out_m, y) + lam**2 *", PARE),
        ("target term of L_mix with weight 1", "(1 - lam) * task.loss(out_m", "1 * task.loss(out_m", PARE),
        ("lambda and 1 - lambda swapped", "(1 - lam) * task.loss(out_m, y) + lam *", "lam * task.loss(out_m, y) + (1 - lam) *",
         PARE),
        ("no L_mix", "loss = loss + args.mix_weight * loss_mix", "loss = loss + 0 * loss_mix", PARE),
        ("mix_weight ignored", "args.mix_weight * loss_mix", "loss_mix", PARE),
        ("h_t on X_t instead of X_m", "self.model.predictor(features_m)", "self.model.predictor(features)", PARE),
        ("h_s on X_t instead of X_m", "self.predictor_s(features_m)", "self.predictor_s(features)", PARE),
        ("source labels of other samples", "x_s, y_s = next(batches_s)", "x_s, y_s = (p.roll(i, 0) for i, p in enumerate("
         "next(batches_s)))", PARE),
        ("second phase never begins", "net(x, tokens_s, k, epoch >= phase2)", "net(x, tokens_s, k, False)", RELEASED),
        ("second phase replaces the lowest", "[:, scores_t.shape[1] - k :, None]", "[:, :k, None]", RELEASED),
        ("gate noise never drawn", "if self.noise > 0:", "if False:", RELEASED),
        ("gate noise not passed on", "args.temperature, args.gate_noise)", "args.temperature)", RELEASED),
        ("Gumbel with the wrong sign", "s + self.noise * gumbel(s)", "s - self.noise * gumbel(s)", RELEASED),
        ("k/N never used", 'max(1, k0 if args.ratio == "k/k0" else N)', "max(1, k0)", RELEASED),
        ("--k-end ignored", "k = schedule(epoch, args.epochs, k0, k_end)", "k = schedule(epoch, args.epochs, k0)", RELEASED),
        ("gate without sigmoid", ".squeeze(-1).sigmoid()", ".squeeze(-1)", PARE),
        ("gate without gradient", "return hard + (p - p.detach())", "return hard", PARE),
        ("highest target tokens replaced", "top_k_mask(scores_t, N - k", "top_k_mask(-scores_t, N - k", PARE),
        ("lowest source tokens inserted", "top_k_mask(scores_s, k", "top_k_mask(-scores_s, k", PARE),
        ("temperature ignored", "s = scores / temperature", "s = scores / 1", PARE),
        ("--temperature not passed on", "predictor_s, args.temperature, args.gate_noise)", "predictor_s, 0.9, args.gate_noise)",
         PARE),
        ("source tokens of the target embedder", "tokens_s = source.embedder(x_s)", "tokens_s = model.embedder(x_s)", PARE),
        ("source embedder trains along", "optimizer = make_optimizer(net, args)",
         "optimizer = make_optimizer(nn.ModuleList([net, source.embedder.requires_grad_()]), args)", PARE),
        ("no clipping", CLIP, "pass", PARE),
        ("schedule never advances", "scheduler.step()", "pass", PARE),
        ("short window divided by --accumulate", "min(args.accumulate, steps - step // args.accumulate * args.accumulate)",
         "args.accumulate", PARE),
        ("gradients summed over the window", "(loss / window).backward()", "loss.backward()", PARE),
        ("every epoch the same seed", 'seed_everything("epoch", args.seed, epoch,', 'seed_everything("epoch", args.seed, 0,',
         PARE),
        (*TRAIN, PARE),
        (*INIT, PARE_START),
        (*DROPOUT, PARE_START),
    ],
    "orca.py": [
        ("class weight n_c / n lost in joint problems", "len(index) / len(c) / n)", "1 / n)", ORCA),
        ("problems not weighed", "loss = mass.sum() * distance(", "loss = distance(", ORCA_RELEASED),
        ("max_samples ignored", "args.max_samples, len(y_t)", "10**6, len(y_t)", ORCA_DRAWS),
        ("target labels ignored", "distance(u_t, y_t[index],", "distance(u_t, 0 * y_t[index],", ORCA),
        ("W^2 as released", '"none" if released else "exact"', '"exact"', ORCA_RELEASED),
        ("all classes in one problem as released", "if otdd and not released else 1", "if otdd else 1",
         ORCA_DRAWS),
        ("the same samples in every embedder epoch", 'stream("alignment", args.seed, epoch)',
         'stream("alignment", args.seed, 0)',
         ORCA_DRAWS),
        ("rate of stage 1 never falls", "scheduler.step()\n        optimizer.zero_grad()\n        rows",
         "optimizer.zero_grad()\n"
         "        rows", "test_the_rate_of_orcas_first_stage_falls_to_a_fifth_after_21_41_and_61_epochs"),
        ("milestones 20, 40, 60", "[21, 41, 61]", "[20, 40, 60]",
         "test_the_rate_of_orcas_first_stage_falls_to_a_fifth_after_21_41_and_61_epochs"),
        ("mmd to the whole source", "u_s[torch.randint(len(u_s), (len(u_t),), generator=generator)]", "u_s",
         "test_mmd_is_to_as_many_source_samples_of_all_of_them"),
        ("source by the target embedder", "u_s = embed_all(source.embedder,", "u_s = embed_all(embedder,", ORCA),
        ("stage 2 from the untouched embedder", "rows = align(embedder,", f"rows = align({COPIED}(embedder),", ORCA),
        ("no clipping", CLIP, "pass", ORCA),
        (*TRAIN, ORCA),
        (*INIT, ORCA),
        (*DROPOUT, ORCA),
    ],
    "recraft.py": [
        ("I goes down", "loss = -information if", "loss = information if", RECRAFT),
        ("gradient of the running table not rescaled", "loss / rate)", "loss)", RECRAFT),
        ("no running table", "(0 if P is None else P.detach())", "0", RECRAFT),
        ("labels of other samples", "y_t[index].to(u_s.device)", "y_t[index.roll(1)].to(u_s.device)", RECRAFT),
        ("--align-samples ignored", "[: args.align_samples]", "", RECRAFT),
        ("no alignment", "take_step(optimizer, parameters, distance(", "print(optimizer, parameters, distance(", RECRAFT),
        ("H(Z) of the target's labels", "entropy(joint.sum(0)), entropy(joint) - entropy(joint.sum(1))",
         "entropy(joint.sum(1)), entropy(joint) - entropy(joint.sum(0))",
         "test_information_of_uniform_collapsed_and_balanced_maps"),
        ("--distortion ignored", 'if args.distortion == "mutual" else h_z_given', "if True else h_z_given",
         "test_entropy_collapses_and_mutual_information_does_not"),
        ("rests of groups count", "if 2 * len(g) >= args.label_samples)", ")", RECRAFT_RELEASED),
        ("the released predictor frozen", "h_s.requires_grad_(args.as_released)", "h_s", RECRAFT_RELEASED),
        ("source predictor trains along", "h_s.requires_grad_(args.as_released)", "h_s.requires_grad_(True)", RECRAFT_SAME),
        ("encoder in training mode", ".to(device).eval()", ".to(device).train()", RECRAFT_SAME),
        ("encoder frozen in stage 2", "model.encoder.requires_grad_(True)", "pass", RECRAFT_KEPT),
        ("text's softmax taken once as released", "out.softmax(1) if released and text else out", "out",
         "test_the_source_predictor_learns_and_the_released_one_of_text_stays_flat"),
        ("stage 2 from the untouched embedder", "rows = learn_embedder(embedder,", f"rows = learn_embedder({COPIED}(embedder),",
         RECRAFT_KEPT),
        ("--freeze-embedder ignored", "embedder.requires_grad_(False)", "pass", RECRAFT_KEPT),
        ("no clipping", CLIP, "pass", RECRAFT_NAIVE),
        (*TRAIN, RECRAFT_NAIVE),
        (*DROPOUT, "test_recraft_passes_its_options_on"),
        (*INIT, "test_recraft_passes_its_options_on"),
    ],
    "contrast.py": [
        ("noise without its scale", "scale * std * torch", "std * torch",
         "test_one_draw_has_mean_and_variance_of_a_chain_of_steps"),
        ("noise around 0", "+ (1 - a_t) * mean", "", "test_views_keep_mean_and_variance_of_a_channel_and_draw_all_scales"),
        ("the last noise step is never drawn", "torch.randint(1, T + 1,", "torch.randint(1, max(2, T),", CONTRAST_1),
        ("samples are their own positives", "(y[:, None] == y) & ~itself", "(y[:, None] == y)", CONTRAST_FORMULA),
        ("each sample among its negatives", "weighted.masked_fill(itself, -1e9)", "weighted", CONTRAST_FORMULA),
        ("positives are weighted", "weights.log().masked_fill(positive, 0)", "weights.log()", CONTRAST_FORMULA),
        ("samples without positives count", "return (loss * (count > 0)).sum()", "return loss.sum()", CONTRAST_FORMULA),
        ("negative correlations count", "correlation(targets).clamp(min=0) + EPS", "correlation(targets) + EPS",
         "test_label_weights_follow_the_correlation_of_the_targets"),
        ("alike targets are pushed apart", "(r * other).sum(1)", "(other / r).sum(1)",
         "test_label_weights_follow_the_correlation_of_the_targets"),
        ("lambda of equal labels", "torch.where(same, 1.0, 1 / (correlations + EPS))", "1 / (correlations + EPS)",
         "test_the_printed_loss_is_its_formula"),
        ("--label-weights ignored", 'if args.label_weights == "targets" else None', "", CONTRAST_FIELDS),
        ("--as-printed ignored", "if args.as_printed:", "if False:", CONTRAST_FIELDS),
        ("an undefined loss goes on", "not loss.isfinite():", "False:",
         "test_the_printed_formula_stops_the_run_where_it_is_undefined"),
        ("one view", "twice = index.repeat_interleave(2)", "twice = index", CONTRAST_1),
        ("no noise", "noised = lambda x: encode(views(x, sigmas, args.noise_steps, mean, std))", "noised = encode",
         CONTRAST_1),
        ("--tau ignored", "labels, weights, args.tau)", "labels, weights)", CONTRAST_1),
        ("cosines of a sample with itself", "mean_of(same & ~itself)", "mean_of(same)",
         CONTRAST_1),
        ("encoder in training mode", "model.encoder.eval()", "model.encoder.train()", CONTRAST_1),
        ("encoder frozen in stage 2", "model.encoder.requires_grad_(True)", "pass", CONTRAST_KEPT),
        ("--features ignored", '"encoder")) == "encoder"', '"encoder")) != ""',
         "test_z_is_of_the_part_that_is_named_and_one_hot_inputs_are_told"),
        ("stage 2 from the untouched embedder", "rows = learn_embedder(embedder,", f"rows = learn_embedder({COPIED}(embedder),",
         CONTRAST_1),
        ("--freeze-embedder ignored", "embedder.requires_grad_(False)", "pass", CONTRAST_KEPT),
        ("target scores for both", "scores_t, scores_s, k)  # line 6", "scores_t, scores_t, k)  # line 6", CONTRAST_2),
        ("source scores of other samples", "scores_s[order_s[step]]", "scores_s[order_s[step].flip(0)]", CONTRAST_2),
        ("lambda and 1 - lambda swapped", "(1 - lam) * task.loss(out_m, y) + lam *", "lam * task.loss(out_m, y) + (1 - lam) *",
         CONTRAST_2),
        ("mix_weight ignored", "args.mix_weight * loss_mix", "loss_mix", CONTRAST_2),
        ("source tokens of the target embedder", "tokens_s = source.embedder(x_s)", "tokens_s = embedder(x_s)", CONTRAST_2),
        ("k of the epoch after", "k = schedule(epoch, args.epochs", "k = schedule(epoch + 1, args.epochs", CONTRAST_2),
        ("no clipping", CLIP, "pass", CONTRAST_2),
        (*TRAIN, CONTRAST_2),
        (*INIT, CONTRAST_2),
        (*DROPOUT, CONTRAST_2),
    ],
    "lsg.py": [
        ("mean over the whole prompt", "tokens[prompts[i][1]].mean(0)", "tokens.mean(0)", LSG_MEAN),
        ("nodes of any length", "return F.normalize(t, dim=1)\n", "return t\n", LSG_MEAN),
        ("underscores are read", 'name.replace("_", " ")', "name", LSG_TOKENS),
        ("negative edges", ".clamp(min=0)", "", LSG_GRAPH),
        ("no cliques", "A * (same | (between >= least))", "A * (between >= least)", LSG_GRAPH),
        ("no edges between classes", "A * (same | (between >= least))", "A * same.clone()", LSG_GRAPH),
        ("--edge-ratio of one node's edges", "int(ratio * len(t) ** 2)", "int(ratio * len(t))", LSG_GRAPH),
        ("the released graph has cliques", " & (not released)", "", "test_the_released_graph_of_stage_2_asks_for_no_class"),
        ("no self-loops", ".fill_diagonal_(True)", "", "test_the_released_graph_of_stage_2_asks_for_no_class"),
        ("normalised by rows alone", "return root * A * root.T", "return root**2 * A", "test_a_clique_averages"),
        ("cached whatever the encoder's weights", "key.update(weight.detach().numpy())", "pass", LSG_NODES),
        ("the encoder takes random numbers of the run", "with torch.random.fork_rng(devices=[]):  # building",
         "if True:  # building", LSG_NODES),
        ("stage 1 without activation", "(activation(N_A_t @ gcn.W1) @ gcn.W2)", "(N_A_t @ gcn.W1 @ gcn.W2)", LSG_STAGE1),
        ("L2 never", "F.normalize(o, dim=1) if args.as_released else o, y", "o, y", LSG_STAGE1),
        ("gradients of stage 1 are left for clipping", "optimizer.zero_grad()  # also",
         "step < steps and optimizer.zero_grad()  #", "test_lsg_trains_with_a_frozen_gcn_and_resumes"),
        ("samples do not count for the nodes", "(self.degree + Y.sum(0).repeat_interleave(P)[:, None])", "self.degree",
         LSG_CLOSED),
        ("samples have no self-loop", "(Y @ Y.T + torch.eye(len(Y), device=Y.device) > 0)", "(Y @ Y.T > 0)", LSG_CLOSED),
        ("nodes do not hear of samples", "self.A @ t + (Y.T @ i).repeat_interleave(P, 0)", "self.A @ t", LSG_CLOSED),
        ("samples do not hear of each other", "Y @ by_class(t) + M @ i", "Y @ by_class(t)", LSG_CLOSED),
        ("o without activation", "g_i = activation(root_i", "g_i = (root_i", LSG_CLOSED),
        ("GCN trains along", "gcn.requires_grad_(False)", "gcn", "test_lsg_passes_its_options_on"),
        ("gradient through g", "F.normalize(g.detach(), dim=1)", "F.normalize(g, dim=1)", LSG_DISTANCE),
        ("squared distance", ".norm(dim=1).mean()", ".square().sum(1).mean()", LSG_DISTANCE),
        ("simplex is orthogonal", "torch.eye(K) - 1 / K", "torch.eye(K)",
         "test_random_and_simplex_prototypes_treat_all_classes_alike"),
        ("text prototypes of one prompt", "t.unflatten(0, (K, P)).mean(1)", "t.unflatten(0, (K, P))[:, 0]", LSG_TEXT),
        ("weights swapped", "args.align_weight * align + args.regularise_weight * regularise",
         "args.regularise_weight * align + args.align_weight * regularise", LSG),
        ("features of the first token", "features.float().mean(1)", "features.float()[:, 0]", LSG),
        ("no align loss", "h.new_zeros(()) if o is None else", "h.new_zeros(()) if True else", LSG),
        ("L1 never", "label_graph(t, args.edge_ratio, released=True) if args.as_released else A, gcn)", "A, gcn)",
         LSG_RELEASED),
        ("guided at weights of 0", "guided = args.align_weight + args.regularise_weight > 0", "guided = True", LSG_NAIVE),
        ("neighbours in one process only", "gather(self.projector(features.float().mean(1))), gather(y)",
         "self.projector(features.float().mean(1)), y", "test_two_processes_and_accumulation_give_the_weights_of_one[lsg]"),
        ("no clipping", CLIP, "pass", LSG),
        (*TRAIN, LSG),
        (*INIT, "test_lsg_passes_its_options_on"),
        (*DROPOUT, LSG),
    ],
    "plots.py": [
        ("tracked steps are repeated", "range(self.sent + 1, len(rows) + 1)", "range(1, len(rows) + 1)",
         f"{TRACKED}[tensorboard]"),
        ("tracked by W&B twice after a resume", "self.sent = max(0, self.record.step - 1)", "self.sent = 0",
         f"{TRACK_RESUMED}[wandb]"),
        ("tracked by TensorBoard twice after a resume", "            file.unlink()\n", "            pass\n",
         f"{TRACK_RESUMED}[tensorboard]"),
        ("track: stage 1 under the names of stage 2", 'f"stage1/{name}" if "stage" in row else name', "name",
         "test_rows_of_the_first_stage_come_under_their_own_names[wandb]"),
        ("track: no result", "self.record.summary.update(result)", "pass", f"{TRACKED}[wandb]"),
        ("track: no arguments", 'self.record.add_text("args", json.dumps(arguments))', "pass", f"{TRACKED}[tensorboard]"),
        ("predictions in other units than targets", "out if task.normalised or not task.restore else task.restore(out)", "out",
         "test_fields_and_predictions_are_drawn_in_one_unit"),
        ("normalised targets against restored predictions", "task.normalised or not task.restore", "not task.restore",
         "test_fields_and_predictions_are_drawn_in_one_unit"),
        ("predicted classes in rows", "np.add.at(counts, (y, out.argmax(1)), 1)", "np.add.at(counts, (out.argmax(1), y), 1)",
         "test_the_confusion_matrix_has_true_classes_in_rows"),
        ("as many names as classes not asked for", "if names and len(names) == K <= 24:", "if names and K <= 24:",
         "test_the_confusion_matrix_has_true_classes_in_rows"),
        ("the highest-scored patches are coloured", 'order = score.argsort(kind="stable")',
         'order = (-score).argsort(kind="stable")[:-4]', "test_the_lowest_scored_patches_are_coloured"),
    ],
    "mona.py": [
        ("source tokens of the target embedder", "tokens_s = source.embedder(x_s)", "tokens_s = model.embedder(x_s)", MONA),
        ("--meta-lr ignored", "lr=args.meta_lr or lr", "lr=lr", MONA),
        ("stage 1 in training mode", "    model.eval()\n", "    model.train()\n", MONA),
        ("stage 2 from the untouched embedder", "rows = meta_train(model,", f"rows = meta_train({COPIED}(model),", MONA),
        ("lambda ignored", "lambda_ * (align + uniform)", "(align + uniform)", MONA),
        ("virtual step uphill", "p - alpha * g for", "p + alpha * g for", MONA),
        ("finite difference with the wrong sign", "-lambda_ * alpha * (sides", "lambda_ * alpha * (sides", DIFFERENCE),
        ("features not normalised", "gather(F.normalize(features, dim=1))", "gather(features)", MONA),
        ("pairs of different classes", "(y[:, None] == y[None])", "(y[:, None] != y[None])", MONA),
        ("another temperature of uniformity", "torch.exp(-2 * d)", "torch.exp(-d)", MONA),
        ("pairs of a sample with itself", "(torch.exp(-2 * d) * off_diagonal).sum() / off_diagonal.sum()",
         "torch.exp(-2 * d).mean()", MONA),
        ("predictor of stage 1 never trains", "zip(trained.parameters(), [*g_e, *g_h]", "zip(trained.parameters(), g_e", MONA),
        ("gradients in another layout", "gradient.contiguous()", "gradient", MONA_LAYOUT),
        ("no clipping in stage 1", "nn.utils.clip_grad_norm_(trained.parameters(), args.clip)", "pass", MONA),
        ("few source samples in a batch", "args.batch_size * math.ceil(32 / args.batch_size)", "args.batch_size", MONA),
        ("stage 2 repeats the batches of stage 1", "epoch, *processes(), stage=1)\n        batches_s", "epoch, *processes())\n"
         "        batches_s", MONA),
        ("schedule never advances", "scheduler.step()", "pass", MONA),
        (*TRAIN, MONA),
        (*INIT, MONA),
        (*DROPOUT, MONA),
    ],
    "finetune.py": [
        ("scratch keeps the pretrained weights", 'pretrained=args.mode != "scratch"', "pretrained=True", SCRATCH),
        ("scratch copies the embedder", '"random" if args.mode == "scratch" else args.init', "args.init", SCRATCH),
        ("warm-up trains the predictor", 'return part == "embedder" or not warming',
         'return part != "encoder" or not warming', PARTS),
        ("warm-up a whole epoch too long", "epoch < warming_epochs)", "epoch <= warming_epochs)", PARTS),
        ("frozen trains attention", '(".attn.qkv.", ".attn.proj.", ".mlp.",', '(".attn.proj.", ".mlp.",', PARTS),
        ("the feed-forward of a frozen ViT trains", '(".attn.qkv.", ".attn.proj.", ".mlp.",',
         '(".attn.qkv.", ".attn.proj.",', VIT_PARTS),
        ("probe trains the encoder", 'or part == "predictor"', 'or part != "embedder"', PARTS),
        ("norms trains the whole encoder", 'return part != "encoder" or "norm" in name.lower()', "return True", BASELINES),
        ("lora unscaled", "self.scale * (B @ A)", "(B @ A)", LORA),
        ("lora starts elsewhere", "nn.ParameterList(torch.zeros(", "nn.ParameterList(torch.ones(", LORA),
        ("lora leaves out the feed-forward", 'not trains("frozen", name) and',
         'not trains("frozen", name) and "mlp" not in name and', LORA),
        ("lora without --alpha", "LoRA(model, args.rank, args.alpha)", "LoRA(model, args.rank, 16.0)", MERGED),
        ("lora without --rank", "LoRA(model, args.rank, args.alpha)", "LoRA(model, 8, args.alpha)", MERGED),
        ("lora saves W_0", "self.model.state_dict() | self.merged()", "self.model.state_dict()", MERGED),
        ("a resumed lora tests W_0", """no epoch left
        lora.merge_into(model)""", """no epoch left
        pass""", MERGED),
        ("as released not truncated", '"truncated" if args.as_released else', "", "test_naive_as_released_starts_truncated"),
        ("--init ignored", "else args.init  # finetune", 'else "copy"  # finetune', PARTS),
        (*DROPOUT, NAIVE),
        ("no clipping", CLIP, "pass", NAIVE),
        ("schedule never advances", "scheduler.step()", "pass", NAIVE),
        ("short window divided by --accumulate", "min(args.accumulate, steps - step // args.accumulate * args.accumulate)",
         "args.accumulate", NAIVE),
        ("every epoch the same batches", "args.batch_size, args.seed, epoch, run.rank",
         "args.batch_size, args.seed, 0, run.rank",
         NAIVE),
        (*TRAIN, NAIVE),
    ],
    "common.py": [
        ("ViT: positions not added", "return tokens if self.positions is None else tokens + self.positions", "return tokens",
         VIT),
        ("ViT: the first positions, the class token's among them", "[0, -embedder.tokens :]", "[0, : embedder.tokens]", VIT),
        ("ViT: a LayerNorm in the embedder", "nn.Identity() if vit else nn.LayerNorm(width)", "nn.LayerNorm(width)", VIT),
        ("ViT: target embedder without positions", "source.size, patch, vit)", "source.size, patch)", VIT),
        ("ViT: large random positions", "        if vit:\n            nn.init.normal_(self.positions, std=0.02)",
         "        if vit:\n            nn.init.normal_(self.positions, std=0.2)", "test_a_random_embedder_has_positions_too"),
        ("rollout from queries to keys swapped", "(share[:, :, None] @ A)[:, :, 0]", "(A @ share[..., None])[..., 0]", SCORES),
        ("rollout: children get the whole share", ".flatten(1) / 4  # (B, n)", ".flatten(1)  # (B, n)", SCORES),
        ("received attention of queries", "A.mean(2).flatten(1))  # (B, N)", "A.mean(3).flatten(1))  # (B, N)", SCORES),
        ("class predictor takes the maximum", ".mean(1))  # (B, n, F) -> (B, F)", ".amax(1))  # (B, n, F) -> (B, F)",
         NAIVE),
        ("class predictor takes the first token", ".mean(1))  # (B, n, F) -> (B, F)",
         "[:, 0])  # (B, n, F) -> (B, F)",
         NAIVE),
        ("logits in bf16", "with autocast_off(features):  # bf16 logits", "if True:  # bf16 logits",
         "test_fields_and_logits_are_not_rounded_by_autocast"),
        ("tokens not normalised", "self.norm(tokens.flatten(2).transpose(1, 2))", "tokens.flatten(2).transpose(1, 2)",
         NAIVE),
        ("dropout unchanged", "            module.p = p\n", "            module.p = module.p\n", PARE_START),
        ("copied slices turned", "weight.repeat(1, -(-channels // 3), 1, 1)",
         "weight.flip(1).repeat(1, -(-channels // 3), 1, 1)",
         "test_copy_tiles_the_three_input_slices"),
        ("wider truncated normal", "trunc_normal_(embedder.project.weight, std=0.02)",
         "trunc_normal_(embedder.project.weight, std=0.03)", "test_naive_as_released_starts_truncated"),
        ("twice the ground cost", "cost = d / 2  # 1/2", "cost = d  # 1/2", ORCA_RELEASED),
        ("twice the label distance", "cost = cost + w[s.index][:, t.index] / 2", "cost = cost + w[s.index][:, t.index]", ORCA),
        ("not debiased", "- (s.self_cost + t.self_cost) / 2", "", 
         "test_a_distance_is_zero_to_itself_symmetric_and_blind_to_names_and_order[none-0.5]"),
        ("mass of the target ignored", "inner, reg, mass_t, info)", "inner, reg, None, info)", ORCA),
        ("gradient of Sinkhorn without the plan", "return (slope + (value - slope).detach()).view(shape)",
         "return (2 * slope + (value - 2 * slope).detach()).view(shape)", "test_gradients_are_finite_differences[none-0.5]"),
        ("mmd without its cross term", "- 2 * K[:n, n:].mean()", "- K[:n, n:].mean()", "test_mmd_is_its_formula"),
        ("tokens one too few", "length // k <= max_tokens", "length // k < max_tokens",
         "test_stack_number_of_the_papers_tasks"),
        ("fields transposed in 1D", "return x.transpose(1, 2).flatten(2)  # (B, c, N k)",
         "return x.flatten(2).unflatten(2, (self.channels, -1)).flatten(2).transpose(1, 2).reshape(len(x), self.channels, -1)",
         "test_1d_fields_are_the_values_of_each_tokens_time_steps"),
    ],
    "run.py": [
        ("best.safetensors of another run", 'about.get("run", self.folder.name) != self.folder.name', "False",
         "test_a_checkpoint_of_another_run_is_refused"),
        ("other data are not noticed", 'if split.kind == "official" else None', "if False else None",
         "test_other_data_of_the_same_size_are_noticed"),
        ("answers of several processes out of order", "np.concatenate(parts)[order]", "np.concatenate(parts)", PROCESSES),
        ("a process without samples evaluates none", "own if len(own) else every[:1]", "own", PROCESSES),
        ("schedule counts micro-batches", "n = math.ceil(steps / args.accumulate)", "n = steps",
         "test_schedule_is_linear_up_then_linear_down_in_optimizer_steps"),
        ("short windows are not counted", "math.ceil(batches / args.accumulate)  #", "(batches // args.accumulate)  #",
         "test_steps_are_those_of_the_optimizer"),
        ("toys are called by the names of the real classes", 'task.toy_names if loaded.train.kind == "toy" else task.names',
         "task.names", "test_toy_classes_are_called_what_they_are"),
        ("evaluation in training mode", "        model.eval()\n", "        model.train()\n", EVALUATION),
        ("best checkpoint never loaded", "if self.best_epoch < len(self.history):", "if False:", BEST),
        ("test of the last epoch", '"test": test, "test_last": test_last', '"test": test_last, "test_last": test_last', BEST),
        ("worst epoch is the best", 'row["val"] < self.best', 'row["val"] > -self.best', BEST),
        ("test set is the validation set", "test = test_last = self.evaluate(model, loaded.test, task)",
         "test = test_last = self.evaluate(model, loaded.val, task)", BEST),
        ("rate above its peak", "min(1.0, (t + 1)", "min((t + 1)", NAIVE),
        ("warm-up begins at 0", "(t + 1) / max(W, 1)", "t / max(W, 1)", NAIVE),
        ("decay from the beginning", "(T - t) / max(T - W, 1)", "(T - t) / T", NAIVE),
        ("momentum ignored", "momentum=args.momentum, ", "momentum=0.9, ", NAIVE),
        ("weight decay ignored", "momentum=args.momentum, weight_decay=args.weight_decay", "momentum=args.momentum", NAIVE),
        ("mean loss wrong", "return losses.mean().item() / self.world", "return losses[-1].item() / self.world", NAIVE),
        ("one seed for everything", "torch.manual_seed(stream(name, *numbers))", "torch.manual_seed(0)", NAIVE),
        ("ORCA takes the first token", "embedder(split.inputs(index)).mean(1)", "embedder(split.inputs(index))[:, 0]", ORCA),
        ("momentum lost on resuming", 'optimizer.load_state_dict(state["optimizer"])', "pass", RESUME),
        ("schedule restarts on resuming", 'schedule.load_state_dict(state["schedule"])', "pass", RESUME),
        ("weights lost on resuming", 'getattr(net, "module", net).load_state_dict(state["net"])', "pass", RESUME),
        ("best epoch lost on resuming", 'k in ("history", "best", "best_epoch", "seconds")',
         'k in ("history", "val", "best_epoch", "seconds")', RESUME),
        ("load leaves random weights", "    model.load_state_dict(load_file(best))\n", "", LOADED),
        ("load: in training mode", "return model.to(choose_device()[0]).eval(), task",
         "return model.to(choose_device()[0]), task",
         LOADED),
        ("load forgets the released head", 'pooling=args["as_released"])', "pooling=False)",
         "test_the_released_head_has_nothing_to_load"),
        ("load takes what an earlier version wrote", '{"architecture", "facts"} <= about.keys()', "about is not None",
         "test_a_folder_of_an_earlier_version_says_how_to_complete_it"),
        ("load: damage is not noticed", "    for file in (arguments, best, result):\n", "    for file in ():\n",
         "test_folders_that_hold_no_finished_run_are_refused"),
        ("load of a run that has not ended", "    if not result.exists():\n", "    if False:\n",
         "test_folders_that_hold_no_finished_run_are_refused"),
        ("every process tracks", "if args.track and self.rank == 0 else None", "if args.track else None",
         "test_only_the_first_process_tracks"),
        ("--track belongs to the identity of a run", '"data_dir", "track")', '"data_dir")',
         "test_a_run_may_be_tracked_from_its_middle_on"),
    ],
    "data.py": [
        ("series normalised like images", ".view(-1, *[1] * (len(like.shape) - 1))", "[:, None, None]",
         "test_the_channels_of_a_series_of_ones_own_are_normalised_one_by_one"),
        ("no check of a record", "        files.check_record(self)\n", "",
         "test_a_record_of_ones_own_that_fits_nothing_is_refused"),
        ("no augmentation in training", "yield self._prepare(x, draws[step]), y", "yield self._prepare(x, None), y",
         NAIVE),
        ("targets of other samples", "index(self.y, step)", "index(self.y, step - 1)", NAIVE),
        ("not divided by the standard deviation", "(x - self.mean) / self.std", "(x - self.mean)", NAIVE),
        ("images not scaled to [0, 1]", "x.float() / 255 if", "x.float() / 256 if", NAIVE),
        ("validation samples train", "order[n_val : n_val + n_train]", "order[:n_train]",
         "test_training_validation_and_test_are_disjoint"),
        ("every epoch the same order", '{self.name}", seed, epoch', '{self.name}", seed, 0', NAIVE),
        ("source and target shuffled alike", 'stream(f"batches of {self.name}"', 'stream("batches"',
         "test_source_and_target_are_shuffled_apart"),
        ("processes see the same samples", "(part[:, rank::world] for", "(part[:, : part.shape[1] // world] for",
         "test_processes_share_the_batches_of_one"),
        ("warm-up not squeezed", "warmup_epochs=recipe.warmup_epochs * squeeze", "warmup_epochs=recipe.warmup_epochs",
         "test_a_shorter_run_has_the_same_learning_rate_curve_squeezed"),
        ("classes from 1", "return int(y.max()) + 1", "return int(y.max()) + 2", "test_classes_are_counted_from_0"),
        ("rate of stage 1 not ten times a small one", "lr if lr > 1e-3 else 10 * lr", "lr",
         "test_the_rate_of_orcas_first_stage_is_ten_times_a_small_one"),
        ("--embedder-lr ignored", "lr=args.embedder_lr or (", "lr=(", f"{RECRAFT} {CONTRAST_1}"),
        ("rate of stage 1 as accumulated", "args.lr / (recipe.accumulate if", "args.lr / (1 if",
         "test_a_first_stage_has_the_published_rate_of_one_batch"),
        ("rate of stage 1 by the user's accumulation", "args.lr / (recipe.accumulate if", "args.lr / (args.accumulate if",
         "test_a_first_stage_has_the_published_rate_of_one_batch"),
        ("rate of stage 1 unscaled from an overridden optimizer", " or args.optimizer != recipe.optimizer", "",
         "test_an_optimizer_that_replaces_the_published_one_has_the_rate_that_is_given"),
        ("one uint8 set is taken", "if not isinstance(x, Lazy)}) > 1", "if not isinstance(x, Lazy)}) > 2",
         "test_images_are_uint8_in_both_sets_or_in_neither"),
        ("load forgets the statistics of the training set", "if statistics else task", "if False else task",
         f"{ANSWERS}[darcy]"),
        ("load: classes of the task, not of the data", '"output": loaded.train.output', '"output": task.output', LOADED),
        ("predict: a mask in logits", "restore=scores.sigmoid", "restore=None", f"{ANSWERS}[cosmic]"),
    ],
    "tasks/scores.py": [
        ("right answers counted as wrong", "float(zero_one_loss(y, out.argmax(1)))", "float(zero_one_loss(y, out.argmin(1)))",
         "test_error_is_the_share_of_wrong_answers"),
        ("F1 by samples", 'average="macro"', 'average="micro"', "test_macro_f1_counts_the_classes_that_occur"),
        ("one class against all others", 'multi_class="ovo"', 'multi_class="ovr"', "test_auroc_is_the_share_of_pairs_in_order"),
        ("chunks of a clip not averaged", "out, y = total / np.bincount(clip)[:, None], y[first, :K]",
         "out, y = out[first], y[first, :K]", "test_the_first_chunk_does_not_stand_for_its_clip"),
        ("only hits are counted", "float(true_positive + true_negative) / 2", "float(true_positive)",
         "test_balanced_error_leaves_out_what_does_not_count"),
        ("near residues count", "k=24", "k=23", "test_protein_error_by_hand"),
        ("mean of squares without root", "root((out.float() - y).flatten(1).square().mean(1)).mean()", "squared(out, y)",
         "test_field_losses_by_hand"),
        ("an exact prediction has no gradient", "x.clamp(min=1e-30).sqrt()", "x.sqrt()",
         "test_a_sample_that_is_predicted_exactly_has_no_gradient"),
        ("norm of the prediction", "for v in (out.float() - y, y))", "for v in (out.float() - y, out.float()))",
         "test_field_losses_by_hand"),
        ("positive labels not weighed", "pos_weight=weight)", "pos_weight=None)", "test_binary_losses_by_hand"),
        ("class weights ignored", "(constant(weights, out.device)[y] * each).mean()", "each.mean()",
         "test_rare_classes_weigh_more"),
    ],
    "tasks/images.py": [
        ("no horizontal flip", "torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))", "columns", NAIVE),
        ("crop shifted in one direction only", "shift[:, 1:2] + torch.arange(W", "shift[:, :1] + torch.arange(W", NAIVE),
        ("evaluation is flipped", "    if u is None:\n        return x\n\n    B, C, H, W",
         "    if u is None:\n        return x.flip(3)\n"
         "\n    B, C, H, W", EVALUATION),
        ("image on the sphere transposed", "where = q.flip(-1) / 1.5", "where = q / 1.5",
         "test_projection_equals_ray_casting_point_by_point"),
        ("light from the pole itself", "2.001 / (2.001 - 1", "2.0 / (2.0 - 1",
         "test_projection_equals_ray_casting_point_by_point"),
        ("rotations prefer a direction", "2 * np.pi * r1, 2 * np.pi * r2, 2 * r3", "2 * np.pi * r1, 2 * np.pi * r2, r3",
         "test_rotations_are_rotations_without_a_preferred_direction"),
    ],
    "tasks/published.py": [
        ("rate not raised for the average", "lr = accumulate * lr if", "lr = lr if",
         "test_averaged_gradients_with_our_settings_take_the_official_step"),
        ("decay not lowered for the average", "else weight_decay / accumulate", "else weight_decay",
         "test_averaged_gradients_with_our_settings_take_the_official_step"),
        ("a source of the other modality", 'TEXT = dict(source="conll2003")', 'TEXT = dict(source="cifar10")',
         "test_recipes_name_a_source_of_their_modality"),
    ],
    "tasks/tables.py": [
        ("scaled by the test rows, too", "numbers[train].mean(0)", "numbers.mean(0)",
         "test_a_table_with_categories_becomes_columns_in_sequence"
         " test_numbers_alone_are_one_position_and_columns_with_gaps_are_left_out"),
        ("frequent classes weigh more", "len(train) / (K * np.bincount(y[train], minlength=K))",
         "K * np.bincount(y[train], minlength=K) / len(train)", "test_rare_classes_weigh_more"),
        ("a constant column divided by rounding", "np.where(spread > 0, std, 1)", "np.where(std > 0, std, 1)",
         "test_a_constant_column_is_not_scaled"),
        ("any URL is read", 'if parts.scheme not in ("http", "https")', "if False",
         "test_a_url_of_a_local_file_or_out_of_the_folder_is_refused[file:///etc/hostname]"),
        ("predict: unseen gaps become zeros", "if beyond.any():", "if False:", "test_rows_of_a_table_have_its_categories"),
        ("predict: gaps among numbers", "np.isnan(values) & categories.any()", "np.isnan(values)",
         "test_rows_of_a_table_have_its_categories"),
    ],
    "tasks/fields.py": [
        ("map and features of different proteins", "if m != wanted", "if False",
         "test_proteins_whose_files_do_not_agree_are_named"),
        ("darcy scaled by the test set", "mean, std = a.mean(0), a.std(0, ddof=1) + 1e-5",
         "mean, std = a_test.mean(0), a_test.std(0, ddof=1) + 1e-5",
         "test_darcy_is_every_fifth_point_normalised_by_training_pixels"),
        ("x and y of darcy swapped", "for grid in (x, y))", "for grid in (y, x))",
         "test_darcy_is_every_fifth_point_normalised_by_training_pixels"),
        ("NaN in a mask is background", "np.isnan(tile[1]).any()", "False", "test_damaged_tiles_are_named"),
        ("bright pixels that do not count", "counts = tile[2] == 0", "counts = tile[2] >= 0",
         "test_cosmic_takes_galaxy_fields_their_middle_and_the_sky"),
        ("predict: darcy without its units", "out * std_y + mean_y", "out", "test_fields_are_in_the_units_of_the_files"),
        ("predict: navier_stokes1d not normalised", "return (check(where, x, (1, *mean.shape)) - mean) / std",
         "return check(where, x, (1, *mean.shape))", f"{ANSWERS}[navier_stokes1d]"),
    ],
    "tasks/signals.py": [
        ("windows of rare rhythms as far apart as others", '"A": 500 // 6', '"A": 500 // 2',
         "test_ecg_windows_follow_the_stride_of_their_class"),
        ("a constant record divided by rounding", "(signal != signal[:1]).any()", "signal.std()",
         "test_a_constant_record_becomes_zeros"),
        ("labels of satellite shifted", '"class", 24, first=1)', '"class", 24, first=0)', "test_satellite_labels_begin_at_1"),
    ],
    "tasks/files.py": [
        ("no lock", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN",
         "test_a_file_is_downloaded_by_one_process_at_a_time"),
        ("half a file may stay", "part.unlink(missing_ok=True)", "pass", "test_a_full_disk_leaves_no_part_of_an_array"),
        ("a file is written in place", 'part.open("wb")', 'path.open("wb")', "test_a_full_disk_keeps_what_was_saved"),
        ("of samples in files of their own only the first", "x[i] = sample", "x[0] = sample",
         "test_psicov_pairs_features_of_rows_and_columns"),
        ("a longer file is taken", "if size > total > 0", "if False",
         "test_a_part_that_is_not_of_this_file_is_removed"),
        ("a cut tar file is unpacked", "check_end(archive)\n", "pass\n",
         "test_a_damaged_tar_file_is_named_and_nothing_is_unpacked"),
        ("a damaged zip file is unpacked", "if damaged := archive.testzip():", "if False:",
         "test_a_damaged_zip_file_is_named_and_nothing_is_unpacked"),
        ("a damaged type of numbers is taken", "or state[2:] != expected[2:]", "", "test_a_damaged_type_is_refused"),
    ],
    "tasks/text.py": [
        ("label of words that are not read", " and end <= WORDS", "",
         "test_the_label_is_that_of_the_words_that_are_read_to_their_end"),
        ("pieces end elsewhere", "lines[i : i + WORDS]]", "lines[i + 1 : i + 1 + WORDS]]",
         "test_conll2003_is_cut_into_32_words_with_the_type_that_most_have"),
    ],
    "cli.py": [
        ("seeds of more than 32 bits are cut", "(number % 2**32, number >> 32)", "(number % 2**32, 0)",
         "test_streams_of_other_names_or_numbers_are_others"),
        ("streams without a name", "entropy = [zlib.crc32(name.encode()),", "entropy = [7,",
         "test_streams_of_other_names_or_numbers_are_others"),
        ("0 is positive", 'not 0 < value < float("inf"):', 'not 0 <= value < float("inf"):',
         "test_a_mistake_costs_two_lines_and_exit_code_2"),
        ("no upper bound", "if not 0 <= number <= most:", "if not 0 <= number:",
         "test_a_mistake_costs_two_lines_and_exit_code_2"),
        ("every error is called full memory", "if not (on_gpu or isinstance(error, MemoryError)", "if not (True",
         "test_full_memory_costs_two_lines_and_other_errors_are_shown"),
        ("full memory is not reported", "on_gpu or isinstance(error, MemoryError)", "on_gpu",
         "test_full_memory_costs_two_lines_and_other_errors_are_shown"),
        ("a mistake exits with 1", "raise SystemExit(2)", "raise SystemExit(1)", "test_a_forbidden_folder_costs_two_lines"),
    ],
    "backbones.py": [
        ("no token before a text", "first = len(begin + before)", "first = len(before)", LSG_TOKENS),
        ("ViT: class token without its position", "self.prefix.data += positions", "pass", VIT),
        ("ViT: class and distillation token swapped", '("cls_token", "dist_token", "reg_token")',
         '("dist_token", "cls_token", "reg_token")', VIT),
        ("ViT: no registers", '"dist_token", "reg_token")', '"dist_token")', VIT),
        ("ViT: class token left out", "if self.prefix is not None:", "if False:", VIT),
        ("ViT: class token among the features", "(self.norm_pre(x)))[:, -N:]", "(self.norm_pre(x)))[:, :N]", VIT),
        ("ViT: without CLIP's first LayerNorm", "self.blocks(self.norm_pre(x))", "self.blocks(x)", VIT),
        ("tiny-swin: fields of 32 x 32 pixels", "max(16, swin", "max(8, swin",
         "test_the_tiny_swin_has_a_pixel_for_each_cell_of_a_simulated_field"),
        ("ViT: without its last LayerNorm", "self.norm(self.blocks(self.norm_pre(x)))", "self.blocks(self.norm_pre(x))", VIT),
        ("ViT: fields as of a Swin", "vit.patch_embed.patch_size[0]  # as in", "32  # as in", VIT),
        ("ViT: attention to the class token counts", "return A / A.sum(-1, keepdim=True)", "return A", VIT_SCORES),
        ("ViT: attention of the first tokens, not of the patches", "[:, :, -N:, -N:]", "[:, :, :N, :N]", VIT_SCORES),
        ("ViT: attention unscaled", "module.scale * module.q_norm(q)", "module.q_norm(q)", VIT_SCORES),
        ("ViT: queries not normalised", "module.q_norm(q)", "q", VIT_SCORES),
        ("ViT: keys not normalised", "module.k_norm(k)", "k", VIT_SCORES),
        ("ViT: a hybrid is cut", "type(patches) is PatchEmbed and isinstance(patches.norm, nn.Identity)",
         'isinstance(getattr(patches, "norm", nn.Identity()), nn.Identity)', VIT_PLAIN),
        ("ViT: the norm of a patch embedding is forgotten", "isinstance(patches.norm, nn.Identity) and", "", VIT_PLAIN),
        ("ViT: one without positions is cut", " and model.pos_embed is not None", "", VIT_PLAIN),
        ("ViT: other blocks are cut", 'type(getattr(block, "attn", None)) is Attention for', "True for", VIT_PLAIN),
        ("ViT: blocks too many", r"\b(layers?|blocks)\.", r"\blayers?\.",
         "test_a_vit_that_is_not_all_in_its_folder_is_refused"),
        ("ViT: heads are needed", '"head_dist.", "fc_norm.", "attn_pool.")', ")", "test_heads_of_a_vit_may_be_missing"),
        ("ViT: names of DeiT III", r'r"ls\1.gamma", key)', r'r"gamma_\1", key)', "test_names_of_the_official_codes_are_read"),
        ("ViT: timm's assertions end in a traceback", "TypeError, AssertionError,", "TypeError,",
         "test_a_vit_that_cannot_be_built_is_refused"),
        ("windows not shifted", "roll([-s for s in block.shift_size], (0, 1))", "clone()", SCORES),
        ("no relative positions", " + bias.T.unflatten(1, (x.shape[1], x.shape[1]))", "", SCORES),
        ("no mask between shifted regions", "logits if mask is None else logits + mask[:, None]", "logits", SCORES),
        ("attention unscaled", "q @ k.mT / q.shape[-1] ** 0.5", "q @ k.mT", SCORES),
        ("scores with dropout", "encoder.eval().forward(tokens)", "encoder.forward(tokens)", KEPT_MODEL),
        ("hooks stay", "            handle.remove()\n", "            pass\n", KEPT_MODEL),
        ("encoder without its last LayerNorm", "return self.norm(self.layers(x)).flatten(1, 2)",
         "return self.layers(x).flatten(1, 2)",
         NAIVE),
        ("weights of the file not loaded", "        swin.load_state_dict(weights, strict=False)\n", "        pass\n",
         PARE_START),
        ("positions of RoBERTa from its first row", "return 0 if padding is None else padding + 1", "return 0",
         "test_what_is_copied_in_1d"),
        ("special tokens in a text", "add_special_tokens=False", "add_special_tokens=True",
         "test_words_get_no_start_and_end_tokens"),
        ("no failure for a file of other weights", "        compare_weights(path, swin, weights)\n", "",
         "test_a_file_of_pretrain_that_lacks_a_layer_is_refused[tiny-swin]"),
        ("load: a folder's architecture without its arguments", '{"timm": named, **more}', '{"timm": named}',
         "test_the_backbone_is_not_needed"),
    ],
    "predict.py": [
        ("logits of classes", "data.scores.softmax(out)", "out", f"{ANSWERS}[cifar100]"),
        ("logits of labels", "else data.scores.sigmoid(out)", "else out", f"{ANSWERS}[fsd50k]"),
        ("probabilities of the weighted loss", "out = out - np.log(", "out = out - 0 * np.log(",
         "test_probabilities_are_shares_also_if_the_loss_has_weights"),
        ("fields as trained on", "return task.restore(out) if task.restore else out", "return out",
         "test_fields_are_in_the_units_of_the_files"),
        ("no preparation", "task.prepare(where, x) if task.prepare else x", "x", f"{ANSWERS}[openml900]"),
        ("images of any type", "if task.pixels and x.dtype != np.uint8:", "if False:",
         "test_samples_of_another_kind_are_refused"),
        ("all uint8 are scaled", "if task.pixels or x.dtype != np.uint8 else", "if True else", "test_images_alone_are_scaled"),
        ("batches in another order", "out.append(", "out.insert(0, ", "test_answers_do_not_depend_on_the_size_of_a_batch"),
        ("answers that are not finite", "if not finite.all():", "if False:", "test_samples_of_another_kind_are_refused"),
        ("inputs are overwritten", "out == Path(args.inputs).resolve() or", "", "test_answers_take_the_place_of_nothing_else"),
        ("a pipe is replaced", "not out.is_file()", "out.is_dir()", "test_answers_take_the_place_of_nothing_else"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    only: str = ""
    """a regular expression for the file and description of a mutation"""
    jobs: int = 2
    """processes at a time"""


@dataclass
class Job:
    name: str
    tests: list[str]  # file::function, maybe [parameters]
    file: str | None = None  # None: the code as it is
    old: str = ""
    new: str = ""


def import_libraries():
    """What the tests import, but nothing of the project: a child imports that, as changed, from its copy."""
    import h5py  # noqa: F401
    import matplotlib
    import numpy  # noqa: F401
    import ot  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize
    import scipy.stats  # noqa: F401
    import sklearn.cluster
    import sklearn.datasets
    import sklearn.metrics
    import sklearn.model_selection  # noqa: F401
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModel, RobertaForMaskedLM, RobertaModel  # noqa: F401

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    gc.freeze()  # a child's garbage collection need not look at all this


def jobs_of(pattern):
    """The jobs: first the tests on the code as it is, file by file, then a job for each mutation."""
    files = {}  # test function -> the files that define it
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for function in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            files.setdefault(function, []).append(path.name)
    mutations, stale = [], []
    for file, rows in MUTATIONS.items():
        source = (ROOT / file).read_text()
        for what, old, new, tests in rows:
            name = f"{file}: {what}"
            if not re.search(pattern, name):
                continue
            nodes = []
            for test in tests.split():
                found = files.get(test.split("[")[0], [])
                if len(found) != 1:
                    stale.append(f"{name}: {test} is defined in {len(found)} files; expected one.")
                nodes += [f"tests/{path}::{test}" for path in found]
            if source.count(old) != 1:
                stale.append(f"{name}: {old!r} occurs {source.count(old)} times")
            mutations.append(Job(name, nodes, file, old, new))
    if stale:
        raise SystemExit("\n".join(stale))
    if not mutations:
        raise SystemExit(f"no mutation matches {pattern!r}")
    needed = {}
    for test in sorted({test for job in mutations for test in job.tests}):
        needed.setdefault(test.split("::")[0], []).append(test)
    return [Job(f"unchanged: {file}", tests) for file, tests in needed.items()], mutations


def start(job, folder):
    """Fork a process that runs the tests of a job in `folder`; its number. What it prints goes to folder/output."""
    if job.file:
        path = folder / job.file
        path.write_text(path.read_text().replace(job.old, job.new))
    sys.stdout.flush()
    if process := os.fork():
        return process
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path[0] = str(folder)
    code = 3
    try:
        import signal

        import pytest

        signal.alarm(LIMIT)
        options = ["-x", "-q", "--tb=native", "-o", "addopts=", "--basetemp", str(folder / "tmp")]
        options += ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # the latter collects garbage for half a second
        code = pytest.main([*options, *job.tests])
    finally:
        os._exit(int(code))


def main(args):
    unchanged, mutations = jobs_of(args.only)
    began = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import_libraries()
    print(f"{len(mutations)} mutations; libraries imported in {time.perf_counter() - began:.0f} s", flush=True)
    waiting, running, wrong = unchanged + mutations, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        free = []
        for number in range(args.jobs):
            free.append(Path(temporary) / str(number))
            skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs*", "datasets", ".*_cache")
            shutil.copytree(ROOT, free[-1], ignore=skipped)
        while waiting or running:
            while waiting and free:
                job, folder = waiting.pop(0), free.pop()
                running[start(job, folder)] = job, folder, time.perf_counter()
            process, status = os.wait()
            job, folder, since = running.pop(process)
            code = os.waitstatus_to_exitcode(status)  # 0 all passed, 1 a test failed; else pytest itself failed, or a signal
            verdict = {0: "survived", 1: "caught"}.get(code, f"no verdict (exit code {code})")
            if job.file is None:
                verdict = "passed" if code == 0 else "FAILED"
            print(f"{verdict:9} {time.perf_counter() - since:5.1f} s  {job.name}", flush=True)
            if verdict not in ("caught", "passed"):
                wrong.append(job.name)
                if verdict != "survived":
                    print((folder / "output").read_text()[-3000:])
            if job.file:
                shutil.copyfile(ROOT / job.file, folder / job.file)
            free.append(folder)
    print(f"{len(mutations)} mutations, {len(wrong)} unexpected outcomes, {time.perf_counter() - began:.0f} s")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
