// The small worlds the explorer walks through. Each is there for a place that is hard to reach.

#include "explorer.h"

namespace tokenspeed::proof {

namespace {

control::GroupConfig full(std::int32_t pages, std::int32_t host_pages = 0) {
    return {.kind = control::GroupKind::kFull,
            .pages = pages,
            .host_pages = host_pages,
            .window = 0,
            .checkpoint_pages = 0};
}

control::GroupConfig window(std::int32_t tokens, std::int32_t pages, std::int32_t host_pages = 0) {
    return {.kind = control::GroupKind::kWindow,
            .pages = pages,
            .host_pages = host_pages,
            .window = tokens,
            .checkpoint_pages = 0};
}

control::GroupConfig latent(std::int32_t pages, std::int32_t host_pages = 0) {
    return {.kind = control::GroupKind::kLatent,
            .pages = pages,
            .host_pages = host_pages,
            .window = 0,
            .checkpoint_pages = 0};
}

control::GroupConfig recurrent(std::int32_t checkpoint_pages, std::int32_t pages,
                               std::int32_t host_pages = 0) {
    return {.kind = control::GroupKind::kRecurrent,
            .pages = pages,
            .host_pages = host_pages,
            .window = 0,
            .checkpoint_pages = checkpoint_pages};
}

control::Config sizes(std::vector<control::GroupConfig> groups, std::int32_t page_size,
                      std::int32_t slots, std::int32_t step_tokens, std::int32_t context,
                      std::int32_t depth, bool cache = true,
                      control::CachePolicy policy = control::CachePolicy::kLru) {
    return {.groups = std::move(groups),
            .page_size = page_size,
            .slots_max = slots,
            .step_tokens_max = step_tokens,
            .context_max = context,
            .overlap_depth = depth,
            .prefix_cache = cache,
            .cache_policy = policy,
            .tps_floor = std::nullopt,
            .queue_timeout_us = std::nullopt,
            .step_drafts_max = 0};
}

}  // namespace

std::vector<Configuration> configurations() {
    std::vector<Configuration> found;
    for (const std::int32_t depth : {0, 1, 2}) {
        const std::string deep = ", depth " + std::to_string(depth);
        // Three prompts that begin alike; the pool holds two of them.
        found.push_back({"shared prefixes" + deep,
                         sizes({full(5)}, 2, 2, 4, 16, depth),
                         {{.prompt = {1, 2, 3}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 3, 4, 5}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 4}, .max_new_tokens = 3}},
                         3,
                         true,
                         false});
        // The same prompt thrice, at once: equal pages are written twice and one copy is dropped.
        found.push_back({"twins" + deep,
                         sizes({full(6)}, 1, 3, 3, 12, depth),
                         {{.prompt = {7, 8}, .max_new_tokens = 2},
                          {.prompt = {7, 8}, .max_new_tokens = 2},
                          {.prompt = {7, 8}, .max_new_tokens = 2}},
                         3,
                         false,
                         false});
        // Outputs grow past what the pool holds: growth, retraction, return.
        found.push_back({"retraction" + deep,
                         sizes({full(4)}, 1, 2, 2, 12, depth),
                         {{.prompt = {1}, .max_new_tokens = 3},
                          {.prompt = {2}, .max_new_tokens = 3},
                          {.prompt = {1, 3}, .max_new_tokens = 2}},
                         3,
                         false,
                         false});
        // Priorities overtake, chunks interleave.
        found.push_back({"priorities" + deep,
                         sizes({full(6)}, 2, 2, 2, 12, depth),
                         {{.prompt = {1, 2, 3, 4, 5}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 6}, .max_new_tokens = 1, .priority = -1},
                          {.prompt = {9}, .max_new_tokens = 3, .priority = 1}},
                         3,
                         false,
                         false});
        // Equal tokens of two tenants share nothing; a stop token ends a request early.
        found.push_back({"salts and stops" + deep,
                         sizes({full(5)}, 1, 2, 4, 10, depth),
                         {{.prompt = {1, 2}, .max_new_tokens = 3, .salt = 1},
                          {.prompt = {1, 2}, .max_new_tokens = 3, .salt = 2},
                          {.prompt = {1, 2},
                           .max_new_tokens = 4,
                           .min_new_tokens = 2,
                           .stop_token_ids = {0, 1, 2},
                           .salt = 1}},
                         3,
                         false,
                         false});
        // Nothing is shared, and every request may be aborted.
        found.push_back({"no cache, aborts" + deep,
                         sizes({full(4)}, 2, 2, 3, 10, depth, false),
                         {{.prompt = {1, 2, 3}, .max_new_tokens = 2},
                          {.prompt = {1, 2}, .max_new_tokens = 3},
                          {.prompt = {4}, .max_new_tokens = 2}},
                         3,
                         false,
                         false});
        // A long prompt gives way to two urgent requests, one after the other, on its way back.
        found.push_back({"gives way" + deep,
                         sizes({full(14)}, 1, 2, 2, 24, depth, false),
                         {{.prompt = {1, 2, 3, 4, 5, 6, 7, 8}, .max_new_tokens = 2, .priority = 1},
                          {.prompt = {1}, .max_new_tokens = 9},
                          {.prompt = {1}, .max_new_tokens = 9}},
                         0,
                         false,
                         false});
        // One slot, from which the urgent push whoever decodes; it comes back, or is aborted apart.
        found.push_back({"parked" + deep,
                         sizes({full(7)}, 1, 1, 2, 8, depth),
                         {{.prompt = {1, 2}, .max_new_tokens = 3, .priority = 1},
                          {.prompt = {3}, .max_new_tokens = 2},
                          {.prompt = {1, 4}, .max_new_tokens = 1}},
                         2,
                         false,
                         false});
        // One that never fits, one that fills the pool alone, one that waits for both.
        found.push_back({"too large" + deep,
                         sizes({full(4)}, 1, 2, 4, 16, depth),
                         {{.prompt = {1, 2, 3, 4, 5}, .max_new_tokens = 2},
                          {.prompt = {1, 2}, .max_new_tokens = 8},
                          {.prompt = {1}, .max_new_tokens = 2}},
                         3,
                         false,
                         false});
        // What leaves the device goes to the host, and comes back by transfers that may fail.
        found.push_back({"host tier" + deep,
                         sizes({full(4, 3)}, 1, 2, 4, 10, depth),
                         {{.prompt = {1, 2, 3}, .max_new_tokens = 1},
                          {.prompt = {4, 5}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 3}, .max_new_tokens = 1}},
                         1,
                         false,
                         true});
        // Sessions: the next turn of one, a fork, and a prompt for whose pages others go.
        found.push_back({"sessions" + deep,
                         sizes({full(5)}, 1, 2, 4, 8, depth, true, control::CachePolicy::kSession),
                         {{.prompt = {1, 2}, .max_new_tokens = 1},
                          {.prompt = {1, 2, 3}, .max_new_tokens = 1},
                          {.prompt = {1, 4, 5}, .max_new_tokens = 2}},
                         1,
                         false,
                         false});
        // Pages behind the window return while others still need them.
        found.push_back({"window" + deep,
                         sizes({full(6), window(2, 2 * depth + 5)}, 1, 2, 2, 8, depth),
                         {{.prompt = {1, 2, 3, 4}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 3}, .max_new_tokens = 2},
                          {.prompt = {1, 2}, .max_new_tokens = 2}},
                         1,
                         true,
                         false});
        found.push_back({"latent and window on the host" + deep,
                         sizes({latent(5, 3), window(3, 2 * depth + 6, 2)}, 1, 2, 2, 8, depth),
                         {{.prompt = {1, 2, 3, 4}, .max_new_tokens = 1},
                          {.prompt = {5, 6, 7}, .max_new_tokens = 1},
                          {.prompt = {1, 2, 3, 5}, .max_new_tokens = 1}},
                         1,
                         false,
                         false});
        // A state is written over by each step; copies of it are kept at the ends of pages.
        found.push_back({"recurrence" + deep,
                         sizes({recurrent(1, 4)}, 2, 2, 4, 10, depth),
                         {{.prompt = {1, 2, 3}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 3, 4, 5}, .max_new_tokens = 1},
                          {.prompt = {1, 2, 6}, .max_new_tokens = 2}},
                         1,
                         false,
                         false});
        found.push_back({"hybrid on the host" + deep,
                         sizes({full(5, 2), recurrent(1, 3, 2)}, 1, 2, 3, 8, depth),
                         {{.prompt = {1, 2, 3}, .max_new_tokens = 1},
                          {.prompt = {4, 5}, .max_new_tokens = 2},
                          {.prompt = {1, 2, 3}, .max_new_tokens = 1}},
                         1,
                         false,
                         true});
        // Drafts of which any number is right: pages are filled by them, left in part and rolled
        // back, beside a prompt, and equal to another's.
        if (depth < 2) {
            Configuration drafts{"drafts" + deep,
                                 sizes({full(7)}, 2, 2, 6, 12, depth),
                                 {{.prompt = {1, 2}, .max_new_tokens = 4},
                                  {.prompt = {1, 2}, .max_new_tokens = 4},
                                  {.prompt = {4}, .max_new_tokens = 1}},
                                 1,
                                 false,
                                 false,
                                 2};
            drafts.config.step_drafts_max = 3;
            found.push_back(std::move(drafts));
        }
        // A draft model proposes, and is right as far as it may be: who is to have a proposal flies
        // on alone, keeps it until the next launch, or loses it when another needs its pages.
        if (depth < 2) {
            Configuration proposals{"proposals" + deep,
                                    sizes({full(5)}, 2, 2, 3, 9, depth),
                                    {{.prompt = {1, 2}, .max_new_tokens = 4},
                                     {.prompt = {4, 0}, .max_new_tokens = 4, .priority = -1}},
                                    1,
                                    false,
                                    false,
                                    0,
                                    2};
            proposals.config.step_drafts_max = 3;
            proposals.config.step_proposals_max = 3;
            proposals.config.proposal_length_max = 2;
            found.push_back(std::move(proposals));
        }
        // Pages run out, windows move on, stop tokens come in the middle of a draft, and the urgent
        // push others out.
        Configuration tight{"drafts on few pages" + deep,
                            sizes({full(4), window(2, 4 * depth + 7)}, 1, 2, 4, 7, depth),
                            {{.prompt = {1}, .max_new_tokens = 4, .priority = 1},
                             {.prompt = {2}, .max_new_tokens = 4, .stop_token_ids = {0}},
                             {.prompt = {1}, .max_new_tokens = 1, .priority = -1}},
                            1,
                            false,
                            false,
                            2};
        tight.config.step_drafts_max = 3;
        found.push_back(std::move(tight));
        // One computes a prompt for another engine, one goes on from what another engine did.
        found.push_back(
            {"handovers" + deep,
             sizes({full(5)}, 1, 2, 3, 8, depth),
             {{.prompt = {1, 2}, .max_new_tokens = 3, .handover = control::Handover::kSend},
              {.prompt = {1, 2, 0}, .max_new_tokens = 2, .handover = control::Handover::kReceive},
              {.prompt = {1, 2}, .max_new_tokens = 2}},
             2,
             false,
             true});
        found.push_back(
            {"handovers of windows and states" + deep,
             sizes({window(2, 3 * depth + 6), recurrent(2, 4)}, 1, 2, 3, 8, depth),
             {{.prompt = {1, 2, 3}, .max_new_tokens = 3, .handover = control::Handover::kSend},
              {.prompt = {1, 2, 0}, .max_new_tokens = 2, .handover = control::Handover::kReceive}},
             2,
             false,
             true});
    }
    for (Configuration& configuration : found) {
        for (Script& script : configuration.scripts) {
            rehearse(script, 3, configuration.config.context_max);
        }
    }
    return found;
}

}  // namespace tokenspeed::proof
