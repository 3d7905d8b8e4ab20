// backend-ggml.cpp - a ggml backend "PTX" that does GGML_OP_KVARN with the CUDA glue and kernels, run on the CPU by on-cpu.h.
// A library for GGML_BACKEND_PATH, so that upstream's test-backend-ops compares it with the CPU backend.
//
// SPDX-License-Identifier: MIT

#include "kvarn-cuda-ggml.cuh"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"

static bool is_view(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_PERMUTE || op->op == GGML_OP_RESHAPE;
}

static const char * name_of_backend(ggml_backend_t backend) { GGML_UNUSED(backend); return "PTX"; }

static void free_backend(ggml_backend_t backend) { delete backend; }

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    GGML_UNUSED(backend);
    ggml_backend_cuda_context ctx;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_view(node)) {
            continue;
        }
        if (const int n = ggml_cuda_kvarn_fuse(ctx, graph, i)) {
            i += n;
        } else if (node->op != GGML_OP_KVARN || !ggml_cuda_op_kvarn(ctx, node)) {
            fprintf(stderr, "%s (%s) is not fused\n", node->name, ggml_op_name(node->op));
            return GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}

static const char * name_of_device(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return "PTX"; }

static const char * describe_device(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return "CUDA kernels on the CPU"; }

static void memory_of_device(ggml_backend_dev_t dev, size_t * free, size_t * total) { GGML_UNUSED(dev); *free = *total = 0; }

static enum ggml_backend_dev_type type_of_device(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return GGML_BACKEND_DEVICE_TYPE_GPU; }

static void props_of_device(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = name_of_device(dev);
    props->description = describe_device(dev);
    props->type        = type_of_device(dev);
}

static ggml_backend_buffer_type_t memory_type(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return ggml_backend_cpu_buffer_type(); }

// ROPE, rotations and SET_ROWS only as a part of what is fused
static bool supports(ggml_backend_dev_t dev, const ggml_tensor * op) {
    GGML_UNUSED(dev);
    return is_view(op) || op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_ROPE || op->op == GGML_OP_SET_ROWS ||
        (op->op == GGML_OP_KVARN && ggml_cuda_kvarn_supported(0, op));
}

static bool supports_memory(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    GGML_UNUSED(dev);
    return ggml_backend_buft_is_host(type);
}

static ggml_backend_t start(ggml_backend_dev_t dev, const char * params) {
    GGML_UNUSED(params);
    static uint8_t guid[16] = { 'k', 'v', 'a', 'r', 'n', ' ', 'p', 't', 'x' };
    ggml_backend * backend = new ggml_backend();
    backend->guid   = &guid;
    backend->device = dev;
    backend->iface.get_name      = name_of_backend;
    backend->iface.free          = free_backend;
    backend->iface.graph_compute = compute;
    return backend;
}

static const char * name_of_reg(ggml_backend_reg_t reg) { GGML_UNUSED(reg); return "PTX"; }

static size_t count_devices(ggml_backend_reg_t reg) { GGML_UNUSED(reg); return 1; }

static ggml_backend_dev_t get_device(ggml_backend_reg_t reg, size_t index) {
    GGML_UNUSED(index);
    static ggml_backend_device device;
    device.reg = reg;
    device.iface.get_name        = name_of_device;
    device.iface.get_description = describe_device;
    device.iface.get_memory      = memory_of_device;
    device.iface.get_type        = type_of_device;
    device.iface.get_props       = props_of_device;
    device.iface.init_backend    = start;
    device.iface.get_buffer_type = memory_type;
    device.iface.supports_op     = supports;
    device.iface.supports_buft   = supports_memory;
    return &device;
}

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg reg;
    reg.api_version            = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = name_of_reg;
    reg.iface.get_device_count = count_devices;
    reg.iface.get_device       = get_device;
    return &reg;
}
