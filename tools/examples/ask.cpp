// Asks a checkpoint one question, from C++ and with the installed library (make install-lib):
//     c++ -std=c++17 -o ask ask.cpp -lmedrun
// Owners close what they hold, and codes become exceptions; the rest is the C API.
#include <medrun.h>

#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

struct Closer {
    void operator()(medrun_model *model) const { medrun_close(model); }
    void operator()(medrun_session *session) const { medrun_stop(session); }
};
using Model = std::unique_ptr<medrun_model, Closer>;
using Session = std::unique_ptr<medrun_session, Closer>;

static void check(int code, const medrun_error &error) {
    if (code != MEDRUN_OK) throw std::runtime_error(error.text);
}

static Model open(const std::string &path) {
    medrun_error error{};
    medrun_model *model = nullptr;
    check(medrun_open(&model, path.c_str(), nullptr, &error), error);
    return Model(model);
}

static Session start(const Model &model, const medrun_session_options &options) {
    medrun_error error{};
    medrun_session *session = nullptr;
    check(medrun_start(&session, model.get(), &options, nullptr, 0, &error), error);
    return Session(session);
}

// Calls SHOW(std::string_view) with each piece of the answer, as soon as there is one.
template <typename Show>
static void ask(const Model &model, const Session &session, std::string_view question, Show show) {
    medrun_error error{};
    const char *text = nullptr;
    std::size_t n_bytes = 0;
    std::int32_t id = 0;
    check(medrun_say(session.get(), "user", question.data(), question.size(), &error), error);
    do {
        check(medrun_next(session.get(), &id, &text, &n_bytes, &error), error);
        show(std::string_view(text, n_bytes));
    } while (!medrun_is_stop(model.get(), id));
}

int main(int argc, char **argv) try {
    if (argc < 2) throw std::runtime_error("usage: ask MODEL.mdr [QUESTION]");
    medrun_session_options options{};
    options.lookup = 8;         // guesses ahead where a text repeats itself; the ids are the same
    Model model = open(argv[1]);
    Session session = start(model, options);
    ask(model, session, argc > 2 ? argv[2] : "What are the symptoms of diabetes?",
        [](std::string_view piece) { std::cout << piece << std::flush; });
    std::cout << '\n';
} catch (const std::exception &problem) {
    std::cerr << problem.what() << '\n';
    return 1;
}
