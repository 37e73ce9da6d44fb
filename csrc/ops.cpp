// Every operator's schema, in one place. Mathematics and shapes: the file named beside each.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(robustft, m) {
  // Kernels, one implementation a device, no autograd: cpu/similarity.cpp
  m.def(
      "similarity_statistics(Tensor x, Tensor t, Tensor scale, Tensor x_labels, Tensor t_labels, "
      "Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale) -> (Tensor row, Tensor col)");
  m.def(
      "similarity_gradient(Tensor x, Tensor t, Tensor scale, Tensor x_labels, Tensor t_labels, "
      "Tensor? x_teacher, Tensor? t_teacher, Tensor? teacher_scale, Tensor row, Tensor col) -> (Tensor dx, Tensor dt)");
  m.def("vector_exp(Tensor x) -> Tensor");
  // cpu/group_risk.cpp, cuda/group_risk.cu
  m.def("group_sums(Tensor values, Tensor groups, int num_groups) -> (Tensor sums, Tensor counts)");

  // Losses, composed from the kernels for every device, with autograd: robustft/ops/native.py
  m.def(
      "contrastive_loss(Tensor x, Tensor t, Tensor scale, Tensor labels, float label_smoothing) "
      "-> (Tensor loss, Tensor scale_gradient, Tensor row, Tensor col)");
  m.def(
      "contrastive_loss_backward(Tensor grad, Tensor x, Tensor t, Tensor scale, Tensor labels, float label_smoothing, "
      "Tensor row, Tensor col) -> (Tensor dx, Tensor dt)");
  m.def(
      "contrastive_distillation_loss(Tensor x, Tensor t, Tensor scale, Tensor x_teacher, Tensor t_teacher, "
      "Tensor teacher_scale, Tensor labels) "
      "-> (Tensor contrastive, Tensor distillation, Tensor scale_gradients, Tensor row, Tensor col)");
  m.def(
      "contrastive_distillation_loss_backward(Tensor g, Tensor h, Tensor x, Tensor t, Tensor scale, Tensor x_teacher, "
      "Tensor t_teacher, Tensor teacher_scale, Tensor labels, Tensor row, Tensor col) -> (Tensor dx, Tensor dt)");
}
