#ifndef EDUBA_KERNELS_REFERENCE_REFERENCE_LAYER_KERNELS_H_
#define EDUBA_KERNELS_REFERENCE_REFERENCE_LAYER_KERNELS_H_

#include <memory>

#include "kernels/layer_kernels.h"

namespace eduba {

// One thread, double, plain loops; results are rounded once. The judge of all other layer kernels.
std::unique_ptr<LayerKernels> MakeReferenceLayerKernels(Activations activations = Activations::kF32);

// The operations, one file each. `weights` [outputs, inputs].
void ReferenceMultiply(const MatmulArgs& args, const float* weights, Activations activations);
void ReferenceNormalise(const NormArgs& args);
void ReferenceRotate(const RopeArgs& args);
void ReferenceActivate(const ActivationArgs& args);
void ReferenceSoftcap(const SoftcapArgs& args);

}  // namespace eduba

#endif  // EDUBA_KERNELS_REFERENCE_REFERENCE_LAYER_KERNELS_H_
