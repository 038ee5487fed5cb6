// Owns the precompiled torch/torch.h that the rooms on full LibTorch share
// (cmake/TorchPackage.cmake).
