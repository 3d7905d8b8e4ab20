// main.cpp - runs random programs on twins, each in a process of its own, and shrinks the first one that fails.
//
//   fuzz run MODEL N_OPS SEED LENGTH [exact=0] [shift=1] [faults=1] [twice=1] [threads=N]
//                                                               random programs of LENGTH operations, about N_OPS in all
//   fuzz replay MODEL FILE                                      one program
//   fuzz create MODEL FILE                                      the same, after contexts for which there is no memory
//   fuzz print SEED LENGTH [...]                                a random program as text
//
// Prints `name value` lines about what was done; on a failure also what differed and the shortest program found that shows it.
//
// SPDX-License-Identifier: MIT

#include "twins.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

static const unsigned SECONDS_PER_PROGRAM = 300;
static const int      SHRINK_RUNS         = 400;

static bool is_creation = false; // contexts are created without memory before the program runs
static bool is_twice    = false; // two threads run it, each with contexts of its own

struct outcome {
    std::string failure; // "": none
    size_t      n_done = 0; // operations before it
    statistics  stats;
};

// ---- one program in a child

// what differed, "" if nothing did; out: where the number of each operation is written before it runs, -1: nowhere
static std::string run_here(const tested_model & model, const program & p, int out, statistics & stats) {
    try {
        twins pair(model, p.set);
        std::string failure;
        try {
            for (fault_kind kind : { FAULT_HOST, FAULT_BUFFER }) {
                if (is_creation) {
                    pair.stats.n_faults += pair.create_without_memory(kind);
                }
            }
            for (uint32_t i = 0; i < p.ops.size(); ++i) {
                if (out >= 0) {
                    (void) !write(out, &i, sizeof(i));
                }
                pair.run(p.ops[i]);
            }
        } catch (const std::exception & error) {
            failure = error.what();
        }
        stats = pair.stats;
        return failure;
    } catch (const std::exception & error) {
        return error.what();
    }
}

static void run_and_tell(const tested_model & model, const program & p, int out) {
    statistics stats, other_stats;
    std::string failure, other_failure;
    std::thread other;
    if (is_twice) {
        other = std::thread([&] { other_failure = run_here(model, p, -1, other_stats); });
    }
    failure = run_here(model, p, out, stats);
    if (is_twice) {
        other.join();
        failure += other_failure.empty() ? "" : " in the other thread: " + other_failure;
    }
    const uint32_t end = UINT32_MAX;
    (void) !write(out, &end, sizeof(end));
    (void) !write(out, &stats, sizeof(stats));
    (void) !write(out, failure.data(), failure.size());
}

static outcome run_child(const tested_model & model, const program & p) {
    int pipe_ends[2];
    FILE * errors = tmpfile();
    if (pipe(pipe_ends) || !errors) {
        perror("fuzz");
        exit(2);
    }
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        close(pipe_ends[0]);
        dup2(fileno(errors), STDERR_FILENO);
        alarm(SECONDS_PER_PROGRAM);
        run_and_tell(model, p, pipe_ends[1]);
        llama_model_free(model.model);
        exit(0); // sanitizers report here
    }
    close(pipe_ends[1]);
    std::string got;
    char buffer[4096];
    for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof(buffer))) > 0;) {
        got.append(buffer, n);
    }
    close(pipe_ends[0]);
    int status = 0;
    waitpid(child, &status, 0);

    outcome res;
    size_t at = 0;
    for (uint32_t n; got.size() - at >= sizeof(n); at += sizeof(n)) {
        memcpy(&n, got.data() + at, sizeof(n));
        if (n == UINT32_MAX) {
            at += sizeof(n);
            memcpy((void *) &res.stats, got.data() + at, sizeof(res.stats));
            res.failure = got.substr(at + sizeof(res.stats));
            break;
        }
        res.n_done = n;
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        std::string text;
        rewind(errors);
        while (fgets(buffer, sizeof(buffer), errors)) {
            text += buffer;
        }
        const int number = WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
        res.failure = !WIFSIGNALED(status) ? "it exited with " + std::to_string(number)
                        : number == SIGALRM ? "it hangs" : "it died of signal " + std::to_string(number);
        res.failure += "\n" + text.substr(0, 4000);
    }
    fclose(errors);
    return res;
}

// ---- shrinking

// the shortest program found that still fails, by leaving operations out, then making their numbers smaller
static program shrink(const tested_model & model, program p, outcome & last) {
    int n_runs = 0;
    const auto still_fails = [&](const program & smaller) {
        if (n_runs++ >= SHRINK_RUNS) {
            return false;
        }
        const outcome o = run_child(model, smaller);
        if (!o.failure.empty()) {
            last = o;
        }
        return !o.failure.empty();
    };

    p.ops.resize(std::min(p.ops.size(), last.n_done + 1));
    for (size_t size = std::max<size_t>(p.ops.size()/2, 1); ; size /= 2) {
        for (size_t start = 0; start < p.ops.size();) {
            program smaller = p;
            smaller.ops.erase(smaller.ops.begin() + start, smaller.ops.begin() + std::min(start + size, p.ops.size()));
            if (!smaller.ops.empty() && still_fails(smaller)) {
                p = smaller;
            } else {
                start += size;
            }
        }
        if (size <= 1) {
            break;
        }
    }
    for (size_t i = 0; i < p.ops.size(); ++i) {
        for (size_t j = p.ops[i].kind == OP_DECODE || p.ops[i].kind == OP_ABORT ? 1 : 0; j < p.ops[i].args.size(); ++j) {
            for (int smaller_arg : { 0, 1, p.ops[i].args[j]/2 }) {
                program smaller = p;
                smaller.ops[i].args[j] = smaller_arg;
                if (smaller_arg < p.ops[i].args[j] && still_fails(smaller)) {
                    p = smaller;
                    break;
                }
            }
        }
    }
    return p;
}

// ---- command line

static void add(statistics & sum, const statistics & s) {
    for (int i = 0; i < OP_COUNT; ++i) {
        sum.done[i] += s.done[i];
    }
    sum.n_full    += s.n_full;
    sum.n_aborted += s.n_aborted;
    sum.n_refused += s.n_refused;
    sum.n_faults  += s.n_faults;
    sum.n_cells   += s.n_cells;
    sum.rows_sum  += s.rows_sum;
    sum.n_logits  += s.n_logits;
    sum.logits_sum  += s.logits_sum;
    sum.rows_worst   = std::max(sum.rows_worst, s.rows_worst);
    sum.logits_worst = std::max(sum.logits_worst, s.logits_worst);
}

static size_t n_done(const statistics & s) {
    size_t n = 0;
    for (size_t done : s.done) {
        n += done;
    }
    return n;
}

static void print(const statistics & s) {
    for (int i = 0; i < OP_COUNT; ++i) {
        printf("%s %zu\n", op_names[i], s.done[i]);
    }
    printf("operations %zu\nfull %zu\naborted %zu\nrefused %zu\nfaults %zu\ncells %zu\nrows_worst %.3g\nrows_mean %.3g\n"
           "logits %zu\nlogits_worst %.3g\nlogits_mean %.3g\n",
           n_done(s), s.n_full, s.n_aborted, s.n_refused, s.n_faults,
           s.n_cells,  s.rows_worst,   s.rows_sum  /std::max<size_t>(s.n_cells,  1),
           s.n_logits, s.logits_worst, s.logits_sum/std::max<size_t>(s.n_logits, 1));
}

static tested_model load_model(const char * path) {
    llama_log_set(keep_log, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    tested_model res = { llama_model_load_from_file(path, params), 1, false };
    if (!res.model) {
        fprintf(stderr, "fuzz: cannot load %s\n", path);
        exit(2);
    }
    res.n_caches     = llama_model_n_swa(res.model) > 0 ? 2 : 1;
    res.is_recurrent = llama_model_is_hybrid(res.model);
    return res;
}

static int report(const tested_model & model, const program & p, outcome o, bool is_shrunk) {
    printf("FAILED: %s\n", o.failure.c_str());
    if (is_shrunk) {
        const program small = shrink(model, p, o);
        printf("shrunk to %zu operations: %s\n%s", small.ops.size(), o.failure.c_str(), to_string(small).c_str());
    }
    return 1;
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    setenv("GGML_NO_BACKTRACE", "1", 1); // of a child: no debugger
    choices c;
    for (int i = 2; i < argc; ++i) {
        sscanf(argv[i], "threads=%d", &c.threads);
        c.exact     = c.exact     && strcmp(argv[i], "exact=0") != 0;
        c.any_shift = c.any_shift || strcmp(argv[i], "shift=1") == 0;
        is_twice    = is_twice    || strcmp(argv[i], "twice=1") == 0;
        c.faults    = c.faults    || strcmp(argv[i], "faults=1") == 0;
    }
    if ((mode == "replay" || mode == "create") && argc > 3) {
        is_creation = mode == "create";
        std::ifstream file(argv[3]);
        std::stringstream text;
        text << file.rdbuf();
        const program p = parse_program(text.str());
        const tested_model model = load_model(argv[2]);
        const outcome o = run_child(model, p);
        print(o.stats);
        const int status = o.failure.empty() ? 0 : report(model, p, o, false);
        llama_model_free(model.model);
        return status;
    }
    if (mode == "print" && argc > 3) {
        printf("%s", to_string(random_program(strtoull(argv[2], nullptr, 10), atoi(argv[3]), c)).c_str());
        return 0;
    }
    if (mode == "run" && argc > 5) {
        const tested_model model = load_model(argv[2]);
        const size_t n_ops = strtoull(argv[3], nullptr, 10);
        statistics sum;
        int status = 0;
        for (uint64_t seed = strtoull(argv[4], nullptr, 10); n_done(sum) < n_ops; ++seed) {
            const program p = random_program(seed, atoi(argv[5]), c);
            const outcome o = run_child(model, p);
            add(sum, o.stats);
            if (!o.failure.empty()) {
                printf("seed %llu\n", (unsigned long long) seed);
                status = report(model, p, o, true);
                break;
            }
        }
        if (status == 0) {
            print(sum);
        }
        llama_model_free(model.model);
        return status;
    }
    fprintf(stderr, "usage: fuzz run MODEL N_OPS SEED LENGTH [exact=0] [shift=1] [faults=1] [twice=1] [threads=N]\n"
                    "       fuzz replay|create MODEL FILE | fuzz print SEED LENGTH [..]\n");
    return 2;
}
