// Every operator's schema, in one place. Mathematics and shapes: the file named beside each.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(robustft, m) {
  // Kernels, one implementation a device, no autograd: cpu/similarity/
  m.def(
      "similarity_statistics(Tensor x, Tensor t, Tensor scale, Tensor x_labels, Tensor t_labels, "
      "Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale, bool totals, bool keep, str precision) "
      "-> (Tensor row, Tensor col, Tensor centers, Tensor kept)");
  m.def(
      "similarity_gradient(Tensor x, Tensor t, Tensor scale, Tensor x_labels, Tensor t_labels, "
      "Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale, Tensor row, Tensor col, Tensor centers, "
      "Tensor kept, bool totals, str precision) -> (Tensor dx, Tensor dt)");
  // Both and the losses between them in one, cpu/similarity/pair_losses.cpp
  m.def(
      "pair_losses(Tensor x, Tensor t, Tensor scale, Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale, "
      "Tensor? labels, float label_smoothing, bool keep, bool mean, str precision) -> (Tensor contrastive, "
      "Tensor distillation, Tensor by_scale, Tensor row, Tensor col, Tensor centers, Tensor kept)");
  m.def(
      "pair_gradients(Tensor g, Tensor? h, Tensor x, Tensor t, Tensor scale, Tensor? x_teacher, Tensor? t_teacher, "
      "Tensor? teacher_scale, Tensor? labels, float label_smoothing, Tensor by_scale, Tensor row, Tensor col, "
      "Tensor centers, Tensor kept, str precision) -> (Tensor dx, Tensor dt, Tensor ds)");
  m.def(
      "sigmoid_sweep(Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor x_labels, Tensor t_labels, "
      "Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale, Tensor? teacher_bias, Tensor? weight, "
      "Tensor? similarities, bool keep, str precision) -> (Tensor sums, Tensor dx, Tensor dt, Tensor kept)");
  m.def(
      "sigmoid_totals(Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor? labels, bool mean, str precision) "
      "-> (Tensor loss, Tensor sums, Tensor dx, Tensor dt, Tensor kept)");
  m.def(
      "sigmoid_scaled(Tensor g, Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor sums, Tensor kept_dx, "
      "Tensor kept_dt, bool mean) -> (Tensor dx, Tensor dt, Tensor ds, Tensor db)");
  // For the tests, cpu/similarity/: the kernels' exp and softplus; cpu/tile.cpp: a tile's products and their arithmetic
  m.def("vector_exp(Tensor x) -> Tensor");
  m.def("vector_softplus(Tensor z) -> (Tensor softplus, Tensor sigmoid)");
  m.def("tile_products(Tensor x, Tensor t, Tensor g, str precision) -> (Tensor s, Tensor dx, Tensor dt)");
  m.def("product_arithmetic(Tensor x, str precision) -> Tensor");
  // cpu/classes.cpp
  m.def(
      "class_statistics(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, Tensor? targets, int heads, "
      "bool misranked, bool means, bool keep, str precision) -> (Tensor statistics, Tensor exponentials)");
  m.def(
      "class_gradient(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, Tensor? targets, int heads, "
      "Tensor exponentials, Tensor coefficients, bool top1, str precision) -> (Tensor dx, Tensor dw, Tensor db)");
  // Both and the losses between them in one, cpu/class_losses.cpp
  m.def(
      "class_losses(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, str variant, bool top1, "
      "float label_smoothing, bool keep, bool mean, str precision) -> (Tensor cross_entropy, Tensor misalignment, "
      "Tensor by_gap, Tensor by_scale, Tensor softmaxes, Tensor exponentials)");
  m.def(
      "class_gradients(Tensor g, Tensor h, Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, bool top1, "
      "float label_smoothing, Tensor by_gap, Tensor by_scale, Tensor softmaxes, Tensor exponentials, str precision) "
      "-> (Tensor dx, Tensor dw, Tensor db, Tensor ds)");
  m.def(
      "dual_losses(Tensor x, Tensor w, Tensor v, Tensor scale, Tensor labels, Tensor core_labels, bool keep, bool "
      "mean, "
      "str precision) -> (Tensor empirical, Tensor worst_case, Tensor by_scale, Tensor softmaxes, "
      "Tensor exponentials)");
  m.def(
      "dual_gradients(Tensor g, Tensor h, Tensor x, Tensor w, Tensor v, Tensor scale, Tensor labels, "
      "Tensor core_labels, Tensor by_scale, Tensor softmaxes, Tensor exponentials, str precision) -> (Tensor dx, "
      "Tensor dw, Tensor ds)");
  // cpu/row_norms.cpp
  m.def("row_norms(Tensor x) -> Tensor");
  // cpu/scores.cpp
  m.def(
      "class_scores(Tensor x, Tensor w, float temperature, Tensor scale, str precision) "
      "-> (Tensor scores, Tensor prediction)");
  m.def(
      "unit_scores(Tensor x, Tensor w, float temperature, Tensor scale, str precision) -> (Tensor max_cosine, "
      "Tensor mcm, Tensor msp, Tensor energy, Tensor entropy, Tensor prediction, Tensor norms)");
  // cpu/group_risk.cpp, cuda/group_risk.cu
  m.def("group_sums(Tensor values, Tensor groups, int num_groups) -> (Tensor sums, Tensor counts)");
  // With autograd, compiled whole: cpu/group_risk.cpp, cuda/group_risk.cu; other devices compose it from group_sums
  m.def(
      "group_risk(Tensor losses, Tensor groups, int num_groups) "
      "-> (Tensor mean, Tensor worst, Tensor worst_group, Tensor counts)");
  m.def("group_risk_backward(Tensor? mean, Tensor? worst, Tensor groups, Tensor worst_group, Tensor counts) -> Tensor");
  // cpu/misalignment.cpp
  m.def(
      "misalignment_penalty(Tensor logits, Tensor labels, str variant, bool top1) "
      "-> (Tensor penalty, Tensor errors, Tensor kept)");
  m.def("misalignment_penalty_backward(Tensor grad, Tensor logits, Tensor labels, bool top1, Tensor kept) -> Tensor");
  // cpu/cvar.cpp, cuda/cvar.cu
  m.def("cvar(Tensor losses, float alpha) -> (Tensor value, Tensor boundary)");
  m.def("cvar_backward(Tensor grad, Tensor losses, float alpha, Tensor boundary) -> Tensor");
  // cpu/orthogonality.cpp
  m.def("orthogonality_penalty(Tensor w, bool squared) -> (Tensor penalty, Tensor residual)");
  m.def(
      "orthogonality_penalty_backward(Tensor grad, Tensor w, Tensor residual, Tensor penalty, bool squared) -> Tensor");
  // cpu/neighbors/, cuda/neighbor_pack.cu, cuda/neighbors.cu
  m.def(
      "neighbor_pack(Tensor points, int samples, bool filter=True) "
      "-> (Tensor centre, Tensor bias, Tensor filter, Tensor sample, Tensor bounds)");
  m.def(
      "kth_neighbor_distance(Tensor queries, Tensor points, Tensor centre, Tensor bias, Tensor filter, Tensor sample, "
      "Tensor bounds, int k, bool squared) -> Tensor");
  m.def(
      "nearest_neighbors(Tensor queries, Tensor points, Tensor centre, Tensor bias, Tensor filter, Tensor sample, "
      "Tensor bounds, int k, bool squared) -> (Tensor distances, Tensor indices)");

  // Losses with autograd. Triton computes them whole; elsewhere robustft/ops/ composes them from the kernels above
  m.def(
      "contrastive_loss(Tensor x, Tensor t, Tensor scale, Tensor? labels, float label_smoothing, bool keep) "
      "-> (Tensor loss, Tensor scale_gradient, Tensor row, Tensor col, Tensor centers, Tensor kept)");
  m.def(
      "contrastive_loss_backward(Tensor grad, Tensor x, Tensor t, Tensor scale, Tensor? labels, float label_smoothing, "
      "Tensor scale_gradient, Tensor row, Tensor col, Tensor centers, Tensor kept) "
      "-> (Tensor dx, Tensor dt, Tensor ds)");
  m.def(
      "contrastive_distillation_loss(Tensor x, Tensor t, Tensor scale, Tensor x_teacher, Tensor t_teacher, "
      "Tensor teacher_scale, Tensor? labels, bool keep) "
      "-> (Tensor contrastive, Tensor distillation, Tensor scale_gradients, Tensor row, Tensor col, Tensor centers, "
      "Tensor kept)");
  m.def(
      "contrastive_distillation_loss_backward(Tensor g, Tensor h, Tensor x, Tensor t, Tensor scale, Tensor x_teacher, "
      "Tensor t_teacher, Tensor teacher_scale, Tensor? labels, Tensor scale_gradients, Tensor row, Tensor col, "
      "Tensor centers, Tensor kept) -> (Tensor dx, Tensor dt, Tensor ds)");
  m.def(
      "sigmoid_contrastive_loss(Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor? labels, Tensor? weight, "
      "str reduction, bool keep) -> (Tensor loss, Tensor sums, Tensor dx, Tensor dt, Tensor kept)");
  m.def(
      "sigmoid_contrastive_loss_backward(Tensor grad, Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor? labels, "
      "Tensor? weight, str reduction, Tensor sums, Tensor kept_dx, Tensor kept_dt, Tensor kept) "
      "-> (Tensor dx, Tensor dt, Tensor ds, Tensor db, Tensor dweight)");
  m.def(
      "sigmoid_contrastive_distillation_loss(Tensor x, Tensor t, Tensor scale, Tensor bias, Tensor x_teacher, "
      "Tensor t_teacher, Tensor teacher_scale, Tensor teacher_bias, Tensor? labels, bool keep) "
      "-> (Tensor contrastive, Tensor distillation, Tensor sums, Tensor kept)");
  m.def(
      "sigmoid_contrastive_distillation_loss_backward(Tensor g, Tensor h, Tensor x, Tensor t, Tensor scale, "
      "Tensor bias, Tensor x_teacher, Tensor t_teacher, Tensor teacher_scale, Tensor teacher_bias, Tensor? labels, "
      "Tensor sums, Tensor kept) -> (Tensor dx, Tensor dt, Tensor ds, Tensor db)");
  m.def(
      "classification_loss(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, str variant, bool top1, "
      "float label_smoothing, bool keep) "
      "-> (Tensor cross_entropy, Tensor misalignment, Tensor by_gap, Tensor scale_gradients, Tensor kept, "
      "Tensor exponentials)");
  m.def(
      "classification_loss_backward(Tensor g, Tensor h, Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor labels, "
      "bool top1, float label_smoothing, Tensor by_gap, Tensor scale_gradients, Tensor kept, Tensor exponentials) "
      "-> (Tensor dx, Tensor dw, Tensor db, Tensor ds)");
  m.def(
      "dual_risk(Tensor x, Tensor w, Tensor scale, Tensor labels, Tensor core_labels, bool keep) "
      "-> (Tensor empirical, Tensor worst_case, Tensor scale_gradients, Tensor kept, Tensor exponentials)");
  m.def(
      "dual_risk_backward(Tensor g, Tensor h, Tensor x, Tensor w, Tensor scale, Tensor labels, Tensor core_labels, "
      "Tensor scale_gradients, Tensor kept, Tensor exponentials) -> (Tensor dx, Tensor dw, Tensor ds)");
  m.def("concept_scores(Tensor x, Tensor w, float temperature, Tensor scale) -> (Tensor scores, Tensor prediction)");
}
