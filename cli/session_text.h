#ifndef EDUBA_CLI_SESSION_TEXT_H_
#define EDUBA_CLI_SESSION_TEXT_H_

#include <string>

#include "cli/output.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// How sessions are told to programs and to people.
std::string DTypeText(v1::DType dtype);
Json SessionJson(const v1::Session& session);
// To stdout: as JSON, or as a table.
void ReportSession(const v1::Session& session, bool json);

}  // namespace eduba

#endif  // EDUBA_CLI_SESSION_TEXT_H_
