// backend-ggml.cpp - a ggml backend "MSL" that does GGML_OP_KVARN with the Metal glue and kernels, run by the executor.
// The glue (metal/kvarn-metal-ggml.cpp) is included as in ggml-metal-ops.cpp; what it calls of ggml's Metal backend stands here,
// on the same headers. A library for GGML_BACKEND_PATH, so that upstream's test-backend-ops compares it with the CPU.
//
// SPDX-License-Identifier: MIT

#include "executor.h"

#include "ggml-metal-device.h"
#include "ggml-metal-ops.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

#include <map>
#include <string>

// ---- as much of ggml's Metal backend as the glue sees

struct ggml_metal_cv {
    std::map<int32_t, int32_t> values;
};

struct ggml_metal_pipeline {
    std::string                kernel;
    std::map<int32_t, int32_t> constants;
};

struct ggml_metal_library {
    std::map<std::string, ggml_metal_pipeline> pipelines;
};

struct ggml_metal_encoder {
    const ggml_metal_pipeline * pipeline  = nullptr;
    msl_dispatch                dispatch  = {};
    size_t                      args_size = 0;
    uint64_t                    count     = 0;
};

struct ggml_metal_op {
    ggml_cgraph        * graph;
    ggml_metal_library_t lib;
    ggml_metal_encoder_t enc;

    ggml_tensor * node(int i) const { return ggml_graph_node(graph, i); }
};

static ggml_metal_buffer_id ggml_metal_get_buffer_id(const ggml_tensor * t) { return { t->data, 0 }; }

extern "C" {

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv(); }

void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = value; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    const auto found = lib->pipelines.find(name);
    res.pipeline = found == lib->pipelines.end() ? nullptr : &found->second;
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(
        ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    lib->pipelines[name] = { base, cv->values };
    return ggml_metal_library_get_pipeline(lib, name);
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params pipeline) {
    GGML_UNUSED(pipeline);
    return getenv("MSL_THREADS") ? atoi(getenv("MSL_THREADS")) : 1024;
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->pipeline = pipeline.pipeline;
    enc->dispatch = {};
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    enc->args_size = size;
    enc->dispatch.buffer[idx] = msl_memory(size, true);
    msl_fill(enc->dispatch.buffer[idx], data, size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    enc->dispatch.buffer[idx] = buffer.metal;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    enc->dispatch.memory = size;
}

void ggml_metal_encoder_dispatch_threadgroups(
        ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    GGML_ASSERT(tptg1 == 1 && tptg2 == 1);
    for (const auto & constant : enc->pipeline->constants) {
        msl_set_constant(constant.first, constant.second);
    }
    enc->dispatch.kernel    = enc->pipeline->kernel.c_str();
    enc->dispatch.groups[0] = (uint32_t) tg0;
    enc->dispatch.groups[1] = (uint32_t) tg1;
    enc->dispatch.groups[2] = (uint32_t) tg2;
    enc->dispatch.threads   = (uint32_t) tptg0;
    enc->dispatch.schedule  = { msl_schedule::DEPTH_FIRST, enc->count++ };
    msl_run(enc->dispatch);
    msl_free(enc->dispatch.buffer[0], enc->args_size);
}

}

#include "kvarn-metal-ggml.cpp"

// ---- the backend: host memory, one op, and views

static ggml_metal_library library;
static ggml_metal_encoder encoder;

static bool is_view(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_PERMUTE || op->op == GGML_OP_RESHAPE;
}

static const char * name_of_backend(ggml_backend_t backend) { GGML_UNUSED(backend); return "MSL"; }

static void free_backend(ggml_backend_t backend) { delete backend; }

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    GGML_UNUSED(backend);
    ggml_metal_op ctx = { graph, &library, &encoder };
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (!is_view(ctx.node(i))) {
            ggml_metal_op_kvarn(&ctx, i);
        }
    }
    return GGML_STATUS_SUCCESS;
}

static const char * name_of_device(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return "MSL"; }

static const char * describe_device(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return "Metal kernels on the CPU"; }

static void memory_of_device(ggml_backend_dev_t dev, size_t * free, size_t * total) { GGML_UNUSED(dev); *free = *total = 0; }

static enum ggml_backend_dev_type type_of_device(ggml_backend_dev_t dev) {
    GGML_UNUSED(dev);
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void props_of_device(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = name_of_device(dev);
    props->description = describe_device(dev);
    props->type        = type_of_device(dev);
}

static ggml_backend_buffer_type_t memory_type(ggml_backend_dev_t dev) { GGML_UNUSED(dev); return ggml_backend_cpu_buffer_type(); }

static bool supports(ggml_backend_dev_t dev, const ggml_tensor * op) {
    GGML_UNUSED(dev);
    return is_view(op) || (op->op == GGML_OP_KVARN && ggml_metal_kvarn_supports(op));
}

static bool supports_memory(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    GGML_UNUSED(dev);
    return ggml_backend_buft_is_host(type);
}

static ggml_backend_t start(ggml_backend_dev_t dev, const char * params) {
    GGML_UNUSED(params);
    static uint8_t guid[16] = { 'k', 'v', 'a', 'r', 'n', ' ', 'm', 's', 'l' };
    ggml_backend * backend = new ggml_backend();
    backend->guid   = &guid;
    backend->device = dev;
    backend->iface.get_name      = name_of_backend;
    backend->iface.free          = free_backend;
    backend->iface.graph_compute = compute;
    return backend;
}

static const char * name_of_reg(ggml_backend_reg_t reg) { GGML_UNUSED(reg); return "MSL"; }

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
