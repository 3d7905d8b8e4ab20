// kvarn-backend-dir.h - the folder of libggml, where a wheel's backends lie. Only for builds with GGML_BACKEND_DL: CMakeLists.txt puts
// it in front of ggml-backend-reg.cpp, which searches GGML_BACKEND_DIR, a call of this function there, before the program's folder.
//
// SPDX-License-Identifier: MIT

#ifndef KVARN_BACKEND_DIR_H
#define KVARN_BACKEND_DIR_H

#include <dlfcn.h>

#include <string>

// "" where the loader does not say: ggml goes on with the next folder
static inline std::string kvarn_backend_dir() {
    Dl_info info;
    if (!dladdr((void *) kvarn_backend_dir, &info) || !info.dli_fname) {
        return "";
    }
    const std::string path = info.dli_fname;
    const size_t      end  = path.rfind('/');
    return end == std::string::npos ? "." : path.substr(0, end);
}

#endif
